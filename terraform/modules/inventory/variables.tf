variable "hosts" {
  description = "Every host: its address for Ansible, its address for the other hosts, its groups, and the node of the plan that it is."
  type = map(object({
    ansible_host = string
    address      = string
    groups       = list(string)
    node         = optional(string)
  }))

  validation {
    condition     = alltrue([for host in var.hosts : length(setsubtract(host.groups, ["nats", "coordinators", "shards", "gateway", "monitoring"])) == 0])
    error_message = "A host's groups are some of nats, coordinators, shards, gateway and monitoring."
  }
  validation {
    condition     = contains([1, 3, 5], length([for host in var.hosts : host if contains(host.groups, "nats")]))
    error_message = "A NATS cluster has 1, 3 or 5 servers: JetStream needs a majority."
  }
}

variable "placement" {
  description = "The placement that `mesh plan --terraform` wrote."
  type = object({
    model               = string
    replication_factor  = number
    overlap_layers      = number
    batch_size          = number
    max_sequence_length = number
    enable_kv_cache     = bool
    shards = list(object({
      shard_id     = number
      node         = string
      layers_start = number
      layers_end   = number
      memory_bytes = number
    }))
  })
}

variable "extra_shards" {
  description = "Shards beside those of the plan: further replicas of its ranges, or those of another plan that is to follow it."
  type = list(object({
    shard_id     = number
    node         = string
    layers_start = number
    layers_end   = number
    memory_bytes = number
  }))
  default = []

  validation {
    condition     = length(distinct(concat([for shard in var.placement.shards : shard.shard_id], [for shard in var.extra_shards : shard.shard_id]))) == length(var.placement.shards) + length(var.extra_shards)
    error_message = "Two shards have the same shard_id: give the extra ones numbers that the plan has not."
  }
  validation {
    condition     = alltrue([for extra in var.extra_shards : extra.layers_start >= 0 && extra.layers_start < extra.layers_end])
    error_message = "A shard serves at least one layer: layers_end is more than layers_start."
  }
}

variable "vars" {
  description = "Variables of every host in the inventory."
  type        = any
  default     = {}
}
