"""Raw filters: what kernels dropped or replaced leaves the stored data, after the answer, as a new version."""
