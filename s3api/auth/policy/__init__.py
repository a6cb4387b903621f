"""The access policy language: JSON documents become statements, statements are matched against one request.

Upstream: s3api.auth.engine decides with it, s3api.operations stores documents that it has checked. Downstream: nothing. All of
it is pure: text and values in, values out; no clock, no catalogue.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_grammar.html
"""
