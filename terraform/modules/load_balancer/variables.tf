variable "name" {
  description = "First part of the name."
  type        = string
}

variable "vpc_id" {
  description = "The network."
  type        = string
}

variable "subnet_ids" {
  description = "The subnets that it is in: public ones, or private ones if it is internal."
  type        = list(string)
}

variable "internal" {
  description = "Whether it is reached from inside the network alone."
  type        = bool
}

variable "security_group_id" {
  description = "Its security group."
  type        = string
}

variable "instance_ids" {
  description = "The coordinators, by name."
  type        = map(string)
}

variable "port" {
  description = "Where it listens."
  type        = number
}

variable "target_port" {
  description = "Where coordinators listen."
  type        = number
}

variable "deletion_protection" {
  description = "Whether it has to be unprotected before it can be destroyed."
  type        = bool
}
