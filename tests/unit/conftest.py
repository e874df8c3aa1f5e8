"""Hypothesis for this folder: no deadlines (a busy machine is not a failure) and no database to write beside the sources."""

from hypothesis import HealthCheck, settings

settings.register_profile("prefork", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("prefork")
