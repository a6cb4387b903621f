"""Put/Get/DeleteBucketTagging: user tags, and the bucket's ``hiss.*`` settings, which are tags too.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketTagging.html. An edit that leaves a setting out keeps it;
deleting the tags deletes the user's, never the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree.ElementTree import Element

from ingest import bucket_settings
from s3api import xml
from s3api.call import Call
from s3api.errors import S3Error
from s3api.http.message import Response
from s3api.integrity import read_document
from s3api.operations.buckets import XML_TYPE

KEY_CHARS_MAX = 128
VALUE_CHARS_MAX = 256


async def put_bucket_tagging(call: Call) -> Response:
    await call.bucket()
    body = await read_document(call.request, call.signed, call.limits.configuration_bytes)
    tags = parsed(xml.parse(body, "Tagging"), call.limits.tags_per_bucket)
    await _edit(call, tags)
    return Response(204)


async def _edit(call: Call, tags: Mapping[str, str]) -> None:
    record, _ = await call.bucket()
    bucket_settings.edited(record.tags, tags)  # says which tag is wrong
    await call.catalog.set_bucket_tags(call.bucket_name, tags)


def parsed(tree: Element, tags_max: int) -> dict[str, str]:
    """Tags of a ``Tagging`` document. Raises InvalidTag or BadXml."""
    tag_set = tree.find("TagSet")
    if tag_set is None:
        raise xml.BadXml("<Tagging> lacks <TagSet>")
    tags: dict[str, str] = {}
    for element in tag_set.findall("Tag"):
        name, value = xml.raw_text(element, "Key"), xml.raw_text(element, "Value")
        if not 0 < len(name) <= KEY_CHARS_MAX:
            raise S3Error("InvalidTag", f"A tag's key must have 1 to {KEY_CHARS_MAX} characters")
        if len(value) > VALUE_CHARS_MAX:
            raise S3Error("InvalidTag", f"The value of {name!r} must have at most {VALUE_CHARS_MAX} characters")
        if name in tags:
            raise S3Error("InvalidTag", f"There is more than one tag with the key {name!r}")
        if name.startswith("aws:"):
            raise S3Error("InvalidTag", "System tags cannot be set")
        tags[name] = value
    if len(tags) > tags_max:
        raise S3Error("InvalidTag", f"A bucket can have {tags_max} tags")
    return tags


async def get_bucket_tagging(call: Call) -> Response:
    await call.bucket()
    record = await call.catalog.bucket(call.bucket_name)
    if not record.tags:
        raise S3Error("NoSuchTagSet", fields=[("BucketName", call.bucket_name)])
    rows: list[tuple[str, xml.Value]] = [
        ("Tag", [("Key", name), ("Value", value)]) for name, value in sorted(record.tags.items())
    ]
    return Response(200, [XML_TYPE], xml.document("Tagging", [("TagSet", rows)]))


async def delete_bucket_tagging(call: Call) -> Response:
    await call.bucket()
    await _edit(call, {})
    return Response(204)
