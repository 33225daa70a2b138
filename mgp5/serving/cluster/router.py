"""Route requests to the replicas of a Ray cluster."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class FewestRequestsRouter(FIFOMixin, RequestRouter):
    """Sends each request to the replica with the fewest; Ray's own router fills the proxy's machine first."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all replicas in one group, of which Ray takes the one with the fewest requests."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # try again later where all are full
        return [random.sample(candidate_replicas, len(candidate_replicas))]  # chance decides among equals
