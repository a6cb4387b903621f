"""What buckets say about access, parsed and kept: from ``BucketRecord.documents`` to the engine's ``BucketRules``; and ``Gate``,
the one way to ask the engine.

In: the catalogue, the directory of users, what the node says for all its buckets. Out: verdicts. Kept until the catalogue's
generation moves, so that a policy holds from the moment its PUT is answered, in every worker.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

import msgspec

from ingest.errors import NoSuchBucket, NoSuchKey, NoSuchVersion
from ingest.ports import Catalog
from ingest.records import BucketRecord, ObjectRecord
from s3api.auth.acl import ALL_BLOCKED, NOT_BLOCKED, Acl, AclGrant, Ownership, PublicAccessBlock
from s3api.auth.engine import NO_RULES, BucketRules, NeedsObject, ObjectFacts, Question, Verdict, decide
from s3api.auth.policy.conditions import Context
from s3api.auth.policy.language import MalformedPolicy, Policy, parse
from s3api.auth.principal import Principal
from s3api.auth.public import is_public

_log = logging.getLogger(__name__)

decode_acl = msgspec.json.Decoder(Acl).decode
decode_block = msgspec.json.Decoder(PublicAccessBlock).decode


class FactsContext(Context, Protocol):
    """A context that is told about the object once that is needed."""

    facts: ObjectFacts | None


@dataclasses.dataclass(frozen=True, slots=True)
class AccessDefaults:
    """What the node's settings say about buckets that say nothing themselves."""

    ownership: str = "BucketOwnerEnforced"
    block_public: bool = False
    """As AWS's account-wide Block Public Access: all four settings, for every bucket, whatever the bucket says."""


def rules_of(record: BucketRecord, defaults: AccessDefaults) -> BucketRules:
    documents = record.documents
    policy: Policy | None = None
    broken = False
    if "policy" in documents:
        try:
            policy = parse(documents["policy"], bucket=record.name)
        except MalformedPolicy as error:
            _log.error("the policy of bucket %s cannot be read: %s", record.name, error)
            broken = True
    own = decode_block(documents["publicAccessBlock"]) if "publicAccessBlock" in documents else NOT_BLOCKED
    return BucketRules(
        owner=record.owner,
        policy=policy,
        policy_public=policy is not None and is_public(policy),
        # Controls that were deleted are empty: then lists hold, as on AWS.
        ownership=Ownership(
            documents.get("ownershipControls", defaults.ownership.encode()).decode("ascii") or "ObjectWriter"
        ),
        acl=decode_acl(documents["acl"]) if "acl" in documents else None,
        block=own.joined(ALL_BLOCKED) if defaults.block_public else own,
        broken=broken,
    )


class Gate:
    """Asks the engine. One for each process that serves requests."""

    def __init__(self, catalog: Catalog, defaults: AccessDefaults | None = None) -> None:
        self.defaults = defaults or AccessDefaults()
        self._catalog = catalog
        self._generation = -1
        self._rules: dict[str, BucketRules] = {}

    async def rules(self, bucket: str) -> BucketRules:
        """``NO_RULES`` for a bucket that does not exist."""
        generation = self._catalog.generation()
        if generation != self._generation:
            self._rules.clear()
            self._generation = generation
        found = self._rules.get(bucket)
        if found is None:
            try:
                found = rules_of(await self._catalog.bucket(bucket), self.defaults)
            except NoSuchBucket:
                return NO_RULES
            # Only what was read under the generation still current may stay.
            if self._catalog.generation() == generation == self._generation:
                self._rules[bucket] = found
        return found

    async def ask(
        self, principal: Principal, question: Question, context: FactsContext, version_id: str | None = None
    ) -> Verdict:
        """``version_id``: of the object, where the request names one."""
        rules = await self.rules(question.bucket) if question.bucket else NO_RULES
        try:
            return decide(principal, rules, question, context, context.facts)
        except NeedsObject:
            context.facts = await self._facts(question, version_id)
            return decide(principal, rules, question, context, context.facts)

    async def _facts(self, question: Question, version_id: str | None) -> ObjectFacts:
        try:
            return facts_of(await self._catalog.head(question.bucket, question.name, version_id))
        except (NoSuchKey, NoSuchVersion, NoSuchBucket):
            return ObjectFacts(exists=False)


def facts_of(record: ObjectRecord) -> ObjectFacts:
    attributes = record.attributes
    acl = None if attributes.acl is None else tuple(AclGrant(*pair) for pair in attributes.acl)
    return ObjectFacts(owner=record.owner, acl=acl, tags=tuple(attributes.tags.items()))
