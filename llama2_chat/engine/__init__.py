"""Ids in, ids out: one thread owns the model, and all requests that fit share every step of it.

`Engine` (engine.py) ties the parts together: `Scheduler` says who runs, a `Runner` says what a step computes, and
`StreamedReply` (reply.py) turns the ids of one answer into text for whoever reads it. docs/architecture.md follows a
request through them.
"""
