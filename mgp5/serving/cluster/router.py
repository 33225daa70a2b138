"""Which replica a request goes to."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class FewestRequests(FIFOMixin, RequestRouter):
    """To the replica with the fewest, on whatever machine: Ray's own way fills those of the proxy's machine first."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full
        return [random.sample(candidate_replicas, len(candidate_replicas))]  # of equals by chance
