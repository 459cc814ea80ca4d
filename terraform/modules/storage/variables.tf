variable "name" {
  description = "Name of the bucket of models; S3 has it only once in the world."
  type        = string
}

variable "kms_key_arn" {
  description = "The key that encrypts it."
  type        = string
}

variable "force_destroy" {
  description = "Whether destroying it also removes the models in it."
  type        = bool
}
