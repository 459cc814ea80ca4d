variable "name" {
  description = "First part of the names of the hosts."
  type        = string
}

variable "hosts" {
  description = "The hosts, by name: the subnet that each is in, and its type."
  type        = map(object({ subnet_id = string, instance_type = string }))
}

variable "ami" {
  description = "The image of the hosts: Debian 12."
  type        = string
}

variable "security_group_id" {
  description = "The security group of the hosts."
  type        = string
}

variable "instance_profile" {
  description = "The profile that lets Session Manager reach the hosts."
  type        = string
}

variable "key_name" {
  description = "The key pair whose public half may log in."
  type        = string
}

variable "disk_gb" {
  description = "Size of the disk of each host."
  type        = number
}

variable "kms_key_id" {
  description = "The key that encrypts the disks."
  type        = string
}
