variables {
  hosts = {
    a = { ansible_host = "10.0.0.1", address = "10.0.0.1", groups = ["nats", "coordinators"] }
    b = { ansible_host = "10.0.0.2", address = "10.0.0.2", groups = ["shards"], node = "node-1" }
    c = { ansible_host = "10.0.0.3", address = "10.0.0.3", groups = ["shards"], node = "node-2" }
  }
  placement = {
    model               = "a-model"
    replication_factor  = 2
    overlap_layers      = 1
    batch_size          = 8
    max_sequence_length = 2048
    enable_kv_cache     = true
    shards = [
      { shard_id = 1, node = "node-1", layers_start = 0, layers_end = 10, memory_bytes = 1000000000 },
      { shard_id = 2, node = "node-1", layers_start = 10, layers_end = 30, memory_bytes = 2000000000 },
      { shard_id = 3, node = "node-2", layers_start = 0, layers_end = 10, memory_bytes = 1000000000 },
    ]
  }
}

run "each_host_has_its_shards" {
  command = apply

  assert {
    condition     = [for shard in yamldecode(output.inventory).all.children.mesh.children.shards.hosts.b.mesh_shards : shard.layers] == ["0-10", "10-30"]
    error_message = output.inventory
  }
  assert {
    condition     = yamldecode(output.inventory).all.children.mesh.vars.mesh_shards_count == 2
    error_message = "there are two ranges, of which one has two replicas"
  }
  assert {
    condition     = !can(yamldecode(output.inventory).all.children.mesh.children.coordinators.hosts.a.mesh_shards)
    error_message = "a host without a node of the plan has no shards"
  }
}

run "a_further_replica_of_a_range" {
  command = apply

  variables {
    extra_shards = [{ shard_id = 9, node = "node-2", layers_start = 10, layers_end = 30, memory_bytes = 2000000000 }]
  }

  assert {
    condition     = [for shard in yamldecode(output.inventory).all.children.mesh.children.shards.hosts.c.mesh_shards : shard.id] == [3, 9]
    error_message = output.inventory
  }
}

run "a_range_without_a_layer" {
  command = plan

  variables {
    extra_shards = [{ shard_id = 9, node = "node-2", layers_start = 5, layers_end = 5, memory_bytes = 2000000000 }]
  }

  expect_failures = [var.extra_shards]
}

run "a_number_that_is_taken" {
  command = plan

  variables {
    extra_shards = [{ shard_id = 3, node = "node-2", layers_start = 0, layers_end = 10, memory_bytes = 1000000000 }]
  }

  expect_failures = [var.extra_shards]
}

run "two_nats_servers" {
  command = plan

  variables {
    hosts = {
      a = { ansible_host = "10.0.0.1", address = "10.0.0.1", groups = ["nats"] }
      b = { ansible_host = "10.0.0.2", address = "10.0.0.2", groups = ["nats", "shards"], node = "node-1" }
    }
  }

  expect_failures = [var.hosts]
}
