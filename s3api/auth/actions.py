"""The actions table: every ``s3:…`` action a policy can name, what a grant must give for it, and what that must cover.

In: nothing. Out: ``ACTIONS``. A row has to exist for each action of the routes table; policies may also name actions
that no operation asks for yet, which then never match.
https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
"""

from __future__ import annotations

import dataclasses
import enum


class Access(enum.IntEnum):
    """Levels of a user's grants; a higher one implies the lower ones."""

    READ = 1
    WRITE = 2
    ADMIN = 3


class Over(enum.Enum):
    """What a grant must cover."""

    NOTHING = "nothing"  # any user; the operation decides, or shows only what the user may see
    ANYTHING = "anything"  # any grant of that level in the bucket; the operation may decide more
    BUCKET = "bucket"
    PREFIX = "prefix"  # the keys a listing asks for
    KEY = "key"


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    access: Access
    over: Over

    @property
    def on_object(self) -> bool:
        """The resource is ``arn:aws:s3:::bucket/key``, not the bucket."""
        return self.over is Over.KEY


_READ, _WRITE, _ADMIN = Access.READ, Access.WRITE, Access.ADMIN

_TABLE: dict[tuple[Access, Over], str] = {
    (_READ, Over.NOTHING): "ListAllMyBuckets",
    (_READ, Over.ANYTHING): (
        "GetBucketLocation GetBucketVersioning GetBucketTagging GetBucketCORS GetBucketObjectLockConfiguration"
        " GetBucketRequestPayment GetBucketOwnershipControls GetEncryptionConfiguration GetAccelerateConfiguration"
        " GetBucketLogging GetBucketWebsite"
    ),
    (_READ, Over.BUCKET): "GetBucketAcl GetBucketPolicyStatus GetBucketPublicAccessBlock",
    (_READ, Over.PREFIX): "ListBucket ListBucketVersions ListBucketMultipartUploads",
    (_READ, Over.KEY): (
        "GetObject GetObjectVersion GetObjectAttributes GetObjectVersionAttributes GetObjectTagging"
        " GetObjectVersionTagging GetObjectAcl GetObjectVersionAcl GetObjectRetention GetObjectLegalHold"
        " ListMultipartUploadParts GetObjectTorrent"
    ),
    (_WRITE, Over.KEY): (
        "PutObject DeleteObject DeleteObjectVersion PutObjectTagging PutObjectVersionTagging DeleteObjectTagging"
        " DeleteObjectVersionTagging PutObjectRetention PutObjectLegalHold AbortMultipartUpload RestoreObject"
    ),
    (_ADMIN, Over.KEY): "PutObjectAcl PutObjectVersionAcl BypassGovernanceRetention ObjectOwnerOverrideToBucketOwner",
    (_ADMIN, Over.BUCKET): (
        "CreateBucket DeleteBucket PutBucketTagging PutBucketVersioning PutBucketObjectLockConfiguration"
        " GetBucketPolicy PutBucketPolicy DeleteBucketPolicy PutBucketAcl PutBucketPublicAccessBlock"
        " PutBucketOwnershipControls PutBucketRequestPayment PutBucketCORS GetBucketNotification PutBucketNotification"
        " GetLifecycleConfiguration PutLifecycleConfiguration PutEncryptionConfiguration PutBucketLogging"
        " PutBucketWebsite DeleteBucketWebsite PutAccelerateConfiguration GetReplicationConfiguration"
        " PutReplicationConfiguration GetInventoryConfiguration PutInventoryConfiguration GetMetricsConfiguration"
        " PutMetricsConfiguration GetAnalyticsConfiguration PutAnalyticsConfiguration"
        " GetIntelligentTieringConfiguration PutIntelligentTieringConfiguration"
    ),
}  # fmt: skip

ACTIONS: dict[str, Action] = {
    f"s3:{name}": Action(access, over) for (access, over), names in _TABLE.items() for name in names.split()
}

# Actions that no operation here asks for; policies that were written for AWS may name them.
OTHER_ACTIONS: tuple[str, ...] = tuple(
    f"s3:{name}"
    for name in (
        "CreateAccessPoint CreateJob DeleteAccessPoint DeleteJobTagging GetAccessPoint GetAccountPublicAccessBlock"
        " GetObjectVersionForReplication GetObjectVersionTorrent InitiateReplication ListAccessPoints ListJobs"
        " PutAccountPublicAccessBlock ReplicateDelete ReplicateObject ReplicateTags UpdateBucketMetadataTableConfiguration"
    ).split()
)

# An operation that names a version needs the action of versions.
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
OF_VERSIONS: dict[str, str] = {
    "s3:GetObject": "s3:GetObjectVersion",
    "s3:GetObjectAttributes": "s3:GetObjectVersionAttributes",
    "s3:GetObjectTagging": "s3:GetObjectVersionTagging",
    "s3:GetObjectAcl": "s3:GetObjectVersionAcl",
    "s3:PutObjectTagging": "s3:PutObjectVersionTagging",
    "s3:PutObjectAcl": "s3:PutObjectVersionAcl",
    "s3:DeleteObject": "s3:DeleteObjectVersion",
    "s3:DeleteObjectTagging": "s3:DeleteObjectVersionTagging",
}
