variable "name" {
  description = "First part of the name of everything."
  type        = string
}

variable "cidr" {
  description = "Addresses of the network."
  type        = string
}

variable "availability_zones" {
  description = "The zones that hosts are spread over."
  type        = list(string)
}

variable "nat" {
  description = "How hosts reach the internet: one NAT gateway, one in each zone, or none (an air-gapped installation, with endpoints for AWS alone)."
  type        = string

  validation {
    condition     = contains(["one", "per_zone", "none"], var.nat)
    error_message = "nat is one, per_zone or none."
  }
}

variable "client_cidrs" {
  description = "Networks of those who may send requests to the load balancer."
  type        = list(string)
}

variable "ports" {
  description = "Ports of the mesh."
  type        = object({ nats = number, routes = number, http = number, https = number, metrics = number, shard_metrics_from = number, shard_metrics_to = number })
}
