"""Uses of a model that the policy is measured on: each is one small function, and a row of docs/workloads.md."""
