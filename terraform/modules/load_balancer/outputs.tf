output "dns_name" {
  description = "The name under which clients reach the mesh."
  value       = aws_lb.this.dns_name
}
