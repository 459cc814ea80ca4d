variable "region" {
  description = "The AWS region."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket, which S3 has only once in the world."
  type        = string
}

variable "destroy_state" {
  description = "Whether `terraform destroy` may remove states that are in it."
  type        = bool
  default     = false
}
