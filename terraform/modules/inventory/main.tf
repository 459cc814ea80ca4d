locals {
  groups = ["nats", "coordinators", "shards", "gateway", "monitoring"]
  shards = concat(var.placement.shards, var.extra_shards)

  # on each node: the shards that it runs
  held = {
    for node in distinct([for shard in local.shards : shard.node]) :
    node => [for shard in local.shards : {
      id            = shard.shard_id
      layers        = "${shard.layers_start}-${shard.layers_end}"
      max_memory_gb = ceil(shard.memory_bytes * 1.05 / 10000000) / 100
    } if shard.node == node]
  }
  ranges = distinct([for shard in local.shards : "${shard.layers_start}-${shard.layers_end}"])

  vars = merge({
    mesh_model               = var.placement.model
    mesh_shards_count        = length(local.ranges)
    mesh_replication_factor  = var.placement.replication_factor
    mesh_overlap_layers      = var.placement.overlap_layers
    mesh_batch_size          = var.placement.batch_size
    mesh_max_sequence_length = var.placement.max_sequence_length
    mesh_enable_kv_cache     = var.placement.enable_kv_cache
  }, var.vars)
}
