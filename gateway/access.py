"""What the node's settings say about access, as the S3 room wants it."""

from __future__ import annotations

from gateway.settings import Settings
from s3api.auth.rules import AccessDefaults


def access_defaults(settings: Settings) -> AccessDefaults:
    return AccessDefaults(ownership=settings.object_ownership, block_public=settings.block_public_access)
