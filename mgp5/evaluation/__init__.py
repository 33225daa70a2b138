"""How well a model replies: `run.evaluate` takes a request, has systems reply to samples, and writes a report.

tasks -> systems -> runner (replies on disk) -> measure (metrics of replies) -> report and page.
"""
