"""Who asks, and may they: SigV4 verification, users, grants.

Upstream: s3api.service. Downstream: nothing but the user store it is given. Everything here decides from the head of a
request; the only state that outlives it is the verifier of a signed aws-chunked body.
"""
