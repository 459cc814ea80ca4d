# Which type each node of the plan gets: the first whose memory holds what the plan says that its shards take.

locals {
  shards = concat(var.placement.shards, var.extra_shards)
  nodes  = distinct([for shard in local.shards : shard.node])

  needed_gib = {
    for node in local.nodes : node => var.reserved_memory_gib + sum([for shard in local.shards : shard.memory_bytes / pow(1024, 3) if shard.node == node])
  }
  fitting = { for node in local.nodes : node => [for type in var.instance_types : type.name if type.memory_gib >= local.needed_gib[node]] }

  largest_range_gib = max([for shard in local.shards : shard.memory_bytes]...) / pow(1024, 3) + var.reserved_memory_gib
  spot_types        = [for type in var.instance_types : type.name if type.memory_gib >= local.largest_range_gib]
  ranges            = { for shard in var.placement.shards : "${shard.layers_start}-${shard.layers_end}" => shard... }

  # each block is fetched once and kept beside the old one while a new model is loaded
  shard_disk_gb = ceil(20 + 2 * max([for node in local.nodes : sum([for shard in local.shards : shard.weights_bytes if shard.node == node])]...) / 1000000000)
  nats_disk_gb  = ceil(20 + 3 * sum([for shard in values(local.ranges) : shard[0].weights_bytes]) / 1000000000)
}
