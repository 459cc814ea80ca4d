variable "name" {
  description = "First part of the name of everything."
  type        = string
  default     = "mesh"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,19}$", var.name))
    error_message = "The name has 2 to 20 lower-case letters, digits and hyphens, and begins with a letter."
  }
}

variable "region" {
  description = "The AWS region."
  type        = string
}

variable "zones" {
  description = "Over how many availability zones hosts are spread."
  type        = number
  default     = 3

  validation {
    condition     = var.zones >= 2 && var.zones <= 6
    error_message = "Give 2 to 6 zones: a NATS cluster of three wants three."
  }
}

variable "availability_zones" {
  description = "Exactly these zones, by name. Empty for the first ones of the region that need no opting in."
  type        = list(string)
  default     = []

  validation {
    condition     = length(var.availability_zones) == 0 || length(var.availability_zones) >= 2
    error_message = "Give at least two zones, or none to have them chosen."
  }
}

variable "cidr" {
  description = "Addresses of the network."
  type        = string
  default     = "10.40.0.0/16"

  validation {
    condition     = can(cidrhost(var.cidr, 1)) && tonumber(split("/", var.cidr)[1]) == 16
    error_message = "Give a network of 16 bits, such as 10.40.0.0/16."
  }
}

variable "nat" {
  description = "How hosts reach package mirrors: one NAT gateway, one per_zone, or none (install from a wheelhouse and an image with the packages)."
  type        = string
  default     = "one"
}

variable "client_cidrs" {
  description = "Networks of those who may send requests to the load balancer. Nobody may by default."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.client_cidrs : can(cidrhost(cidr, 0))])
    error_message = "Each is a network, such as 203.0.113.0/24."
  }
}

variable "internal" {
  description = "Whether the load balancer is reached from inside the network alone."
  type        = bool
  default     = true
}

variable "ssh_public_key" {
  description = "The public key that Ansible logs in with, through Session Manager. The private one stays with you."
  type        = string

  validation {
    condition     = can(regex("^(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp256) [A-Za-z0-9+/=]+", var.ssh_public_key))
    error_message = "Give a public key, such as ssh-ed25519 AAAA...: the content of the file with .pub."
  }
}

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
      shard_id      = number
      node          = string
      layers_start  = number
      layers_end    = number
      memory_bytes  = number
      weights_bytes = number
    }))
  })
}

variable "extra_shards" {
  description = "Shards beside those of the plan; a node that the plan has not is a further host."
  type = list(object({
    shard_id      = number
    node          = string
    layers_start  = number
    layers_end    = number
    memory_bytes  = number
    weights_bytes = number
  }))
  default = []
}

variable "instance_types" {
  description = "Types that shards may run on, from the cheapest to the dearest. The first one whose memory suffices is taken for each node. For GPUs give their memory."
  type        = list(object({ name = string, memory_gib = number }))
  default = [
    { name = "m7i.large", memory_gib = 8 },
    { name = "r7i.large", memory_gib = 16 },
    { name = "r7i.xlarge", memory_gib = 32 },
    { name = "r7i.2xlarge", memory_gib = 64 },
    { name = "r7i.4xlarge", memory_gib = 128 },
    { name = "r7i.8xlarge", memory_gib = 256 },
  ]

  validation {
    condition     = length(var.instance_types) > 0 && alltrue([for type in var.instance_types : type.memory_gib > 0])
    error_message = "Give at least one type, with its memory in GiB."
  }
}

variable "reserved_memory_gib" {
  description = "Memory of a host that its shards may not use: the system, and what the plan does not know of."
  type        = number
  default     = 1
}

variable "nats_servers" {
  description = "How many NATS servers there are."
  type        = number
  default     = 3

  validation {
    condition     = contains([1, 3, 5], var.nats_servers)
    error_message = "A NATS cluster has 1, 3 or 5 servers: JetStream needs a majority."
  }
}

variable "coordinators" {
  description = "How many coordinators there are."
  type        = number
  default     = 2

  validation {
    condition     = var.coordinators >= 1 && var.coordinators <= 20
    error_message = "Give 1 to 20 coordinators."
  }
}

variable "nats_instance_type" {
  description = "Type of the hosts of NATS servers."
  type        = string
  default     = "c7i.large"
}

variable "coordinator_instance_type" {
  description = "Type of the hosts of coordinators."
  type        = string
  default     = "c7i.large"
}

variable "monitoring_instance_type" {
  description = "Type of the host of Prometheus."
  type        = string
  default     = "t3.medium"
}

variable "ami" {
  description = "The image of every host. Empty for Debian's newest image of Debian 12."
  type        = string
  default     = ""
}

variable "spot_replicas" {
  description = "How many further replicas of each layer range run on spot instances. They drain when AWS takes them back."
  type        = number
  default     = 0

  validation {
    condition     = var.spot_replicas >= 0 && var.spot_replicas <= 10
    error_message = "Give 0 to 10."
  }
}

variable "models_bucket" {
  description = "Name of the bucket of models, which S3 has only once in the world."
  type        = string
}

variable "destroy_models" {
  description = "Whether `terraform destroy` may remove the models in the bucket, and an unprotected load balancer."
  type        = bool
  default     = false
}

variable "tags" {
  description = "Further tags of everything."
  type        = map(string)
  default     = {}
}
