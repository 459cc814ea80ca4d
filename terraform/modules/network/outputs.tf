output "vpc_id" {
  description = "The network."
  value       = aws_vpc.this.id
}

output "private_subnet_ids" {
  description = "The private subnet of each zone, in the order of the zones."
  value       = [for zone in var.availability_zones : aws_subnet.private[zone].id]
}

output "public_subnet_ids" {
  description = "The public subnet of each zone, in the order of the zones."
  value       = [for zone in var.availability_zones : aws_subnet.public[zone].id]
}

output "security_group_ids" {
  description = "The security group of each kind of host."
  value       = { for name, group in aws_security_group.this : name => group.id }
}
