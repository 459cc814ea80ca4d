output "groups" {
  description = "The group of each layer range."
  value       = { for layers, group in aws_autoscaling_group.this : layers => group.name }
}
