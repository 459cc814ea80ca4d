# Further replicas on spot instances, if any are asked for. Their identity is a secret whose value Terraform never sees:
# playbooks/spot_identity.yml puts it there.

resource "aws_secretsmanager_secret" "spot" {
  count                   = var.spot_replicas > 0 ? 1 : 0
  name                    = "${var.name}-spot-identity"
  description             = "Certificate, key and NATS user of spot replicas"
  kms_key_id              = aws_kms_key.this.arn
  recovery_window_in_days = var.destroy_models ? 0 : 7
}

data "aws_iam_policy_document" "spot" {
  count = var.spot_replicas > 0 ? 1 : 0

  statement {
    sid       = "ReadWheels"
    actions   = ["s3:GetObject", "s3:ListBucket"]
    resources = [module.storage.arn, "${module.storage.arn}/wheels/*"]
  }
  statement {
    sid       = "Decrypt"
    actions   = ["kms:Decrypt"]
    resources = [aws_kms_key.this.arn]
  }
  statement {
    sid       = "ReadIdentity"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [aws_secretsmanager_secret.spot[0].arn]
  }
  statement {
    sid       = "CompleteTermination"
    actions   = ["autoscaling:CompleteLifecycleAction"]
    resources = ["arn:aws:autoscaling:${var.region}:${data.aws_caller_identity.me.account_id}:autoScalingGroup:*:autoScalingGroupName/${var.name}-spot-*"]
  }
}

resource "aws_iam_role" "spot" {
  count              = var.spot_replicas > 0 ? 1 : 0
  name               = "${var.name}-spot"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "spot" {
  count  = var.spot_replicas > 0 ? 1 : 0
  name   = "spot"
  role   = aws_iam_role.spot[0].id
  policy = data.aws_iam_policy_document.spot[0].json
}

resource "aws_iam_role_policy_attachment" "spot_session_manager" {
  count      = var.spot_replicas > 0 ? 1 : 0
  role       = aws_iam_role.spot[0].name
  policy_arn = "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "spot" {
  count = var.spot_replicas > 0 ? 1 : 0
  name  = "${var.name}-spot"
  role  = aws_iam_role.spot[0].name
}

module "spot" {
  count                = var.spot_replicas > 0 ? 1 : 0
  source               = "../../modules/spot"
  name                 = var.name
  model                = var.placement.model
  ranges               = keys(local.ranges)
  replicas             = var.spot_replicas
  instance_types       = local.spot_types
  ami                  = local.ami
  subnet_ids           = module.network.private_subnet_ids
  security_group_id    = module.network.security_group_ids["shards"]
  instance_profile_arn = aws_iam_instance_profile.spot[0].arn
  key_name             = aws_key_pair.this.key_name
  kms_key_arn          = aws_kms_key.this.arn
  disk_gb              = local.shard_disk_gb
  region               = var.region
  bucket               = module.storage.bucket
  secret_arn           = aws_secretsmanager_secret.spot[0].arn
  nats_urls            = [for host in module.hosts["nats"].hosts : "tls://${host.address}:${local.ports.nats}"]
  mesh_version         = regex("__version__ = \"([^\"]+)\"", file("${path.module}/../../../mesh/__init__.py"))[0]
}
