"""Hypothesis for this folder: no deadlines (a busy machine is not a failure) and no database to write beside the sources.

Its examples are the same at each run, so that what is green lands green; `HYPOTHESIS_PROFILE=search` draws others, by hand.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("search", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("prefork", settings.get_profile("search"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "prefork"))
