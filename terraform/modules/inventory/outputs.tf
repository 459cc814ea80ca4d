output "inventory" {
  description = "The inventory for ansible-playbook, as YAML."
  value = yamlencode({
    all = {
      children = {
        mesh = {
          vars = local.vars
          children = {
            for group in local.groups : group => {
              hosts = {
                for name, host in var.hosts : name => merge(
                  { ansible_host = host.ansible_host, mesh_address = host.address },
                  contains(host.groups, "shards") && host.node != null ? { mesh_shards = lookup(local.held, coalesce(host.node, "-"), []) } : null
                ) if contains(host.groups, group)
              }
            }
          }
        }
      }
    }
  })
}

output "placement" {
  description = "Which host serves which layers."
  value = {
    for name, host in var.hosts : name => [for shard in lookup(local.held, coalesce(host.node, "-"), []) : "shard-${shard.id}: layers ${shard.layers}"]
    if host.node != null
  }
}
