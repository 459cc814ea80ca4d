# The bucket that keeps the state of environments/aws. It is made once, with a state in this folder, which has no secret.

terraform {
  required_version = ">= 1.10"
  required_providers {
    aws = { source = "hashicorp/aws", version = ">= 5.60, < 7" }
  }
}

provider "aws" {
  region = var.region
}

data "aws_caller_identity" "me" {}

data "aws_iam_policy_document" "key" {
  statement {
    sid       = "Account"
    actions   = ["kms:*"]
    resources = ["*"]
    principals {
      type        = "AWS"
      identifiers = ["arn:aws:iam::${data.aws_caller_identity.me.account_id}:root"]
    }
  }
}

resource "aws_kms_key" "this" {
  description             = "Terraform's state in ${var.bucket}"
  enable_key_rotation     = true
  deletion_window_in_days = 7
  policy                  = data.aws_iam_policy_document.key.json
}

module "storage" {
  source        = "../../modules/storage"
  name          = var.bucket
  kms_key_arn   = aws_kms_key.this.arn
  force_destroy = var.destroy_state
}
