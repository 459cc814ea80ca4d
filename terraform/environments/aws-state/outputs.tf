output "bucket" {
  description = "The bucket, for backend.hcl."
  value       = module.storage.bucket
}
