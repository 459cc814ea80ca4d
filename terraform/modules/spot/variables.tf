variable "name" {
  description = "First part of the name."
  type        = string
}

variable "model" {
  description = "Name of the pushed model."
  type        = string
}

variable "ranges" {
  description = "The layer ranges that replicas serve, such as 0-10."
  type        = set(string)
}

variable "replicas" {
  description = "Replicas of each range."
  type        = number
}

variable "instance_types" {
  description = "Types that a replica may run on: the more there are, the less often all are taken back."
  type        = list(string)
}

variable "ami" {
  description = "The image: Debian 12."
  type        = string
}

variable "subnet_ids" {
  description = "The private subnets."
  type        = list(string)
}

variable "security_group_id" {
  description = "The security group of shards."
  type        = string
}

variable "instance_profile_arn" {
  description = "The profile of a replica."
  type        = string
}

variable "key_name" {
  description = "The key pair whose public half may log in."
  type        = string
}

variable "kms_key_arn" {
  description = "The key that encrypts the disks."
  type        = string
}

variable "disk_gb" {
  description = "Size of the disk."
  type        = number
}

variable "region" {
  description = "The AWS region."
  type        = string
}

variable "bucket" {
  description = "The bucket with the wheels, below wheels/."
  type        = string
}

variable "secret_arn" {
  description = "The secret with the identity of a replica. Its value is put there by playbooks/spot_identity.yml, never by Terraform."
  type        = string
}

variable "nats_urls" {
  description = "URLs of the NATS servers."
  type        = list(string)
}

variable "mesh_version" {
  description = "The version that replicas install."
  type        = string
}
