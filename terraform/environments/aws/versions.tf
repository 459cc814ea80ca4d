terraform {
  required_version = ">= 1.10" # a state in S3 with a lock file

  required_providers {
    aws = { source = "hashicorp/aws", version = ">= 5.60, < 7" }
  }

  # the bucket of environments/aws-state: terraform init -backend-config=backend.hcl
  backend "s3" {}
}

provider "aws" {
  region = var.region

  default_tags {
    tags = merge({ Project = var.name, ManagedBy = "terraform" }, var.tags)
  }
}
