variable "placement" {
  description = "The placement that `mesh plan MODEL --nodes ... --terraform placement.auto.tfvars.json` wrote: a host for each of its nodes."
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
  description = "Shards beside those of the plan; a node that the plan has not is a further host."
  type = list(object({
    shard_id     = number
    node         = string
    layers_start = number
    layers_end   = number
    memory_bytes = number
  }))
  default = []
}

variable "ssh_public_key_file" {
  description = "The public key that may log in as the user admin."
  type        = string
}

variable "folder" {
  description = "Folder of the image and of the hosts' disks. It must be on a file system that can carry an overlay, and takes some 1 GB a host."
  type        = string
  default     = "/var/lib/mesh-lab"
}

variable "wheelhouse" {
  description = "Folder of wheels that deploy/provision/wheelhouse.sh filled; the hosts install from it and reach no network."
  type        = string
}

variable "model" {
  description = "The model directory of the plan, which the hosts see at /srv/mesh/model."
  type        = string
}

variable "network" {
  description = "Name of the network namespace that the hosts are in, and the first part of their own."
  type        = string
  default     = "mesh-lab"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,20}$", var.network))
    error_message = "The name has lower-case letters, digits and hyphens, at most 21."
  }
}

variable "cidr" {
  description = "Addresses of the hosts; this machine is the first one, in that namespace alone."
  type        = string
  default     = "10.77.0.0/24"

  validation {
    condition     = can(cidrhost(var.cidr, 200))
    error_message = "Give a network with at least 201 addresses, such as 10.77.0.0/24."
  }
}

variable "vars" {
  description = "Further variables of every host in the inventory."
  type        = map(string)
  default     = {}
}
