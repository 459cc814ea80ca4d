output "hosts" {
  description = "The id and the private address of each host."
  value       = { for name, instance in aws_instance.this : name => { id = instance.id, address = instance.private_ip } }
}
