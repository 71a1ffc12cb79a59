"""Ray: the server over several replicas, and sampling over several machines.

    serve.run(build_openai_app({"llm": {"model": "path/to/model"}, "engine": {"num_replicas": 2}}))

    collect_on_ray({"model": "path/to/model"}, prompts, ["vader"], "runs/mood", workers=8)
    ray_generate(dataset, {"model": "path/to/model"}, SamplingParams(max_tokens=64)).write_parquet("answers")

Replicas and workers are Ray's: what it schedules, restarts, scales and carries between machines is not done here.
"""

from vas_engine.errors import VASError

try:
    import ray  # noqa: F401
except ImportError as error:
    raise VASError("replicas and workers on Ray need it: pip install 'vas-engine[ray]'") from error

from vas_engine.integrations.ray.data import collect_on_ray, ray_generate
from vas_engine.integrations.ray.serve import build_openai_app

__all__ = ["build_openai_app", "collect_on_ray", "ray_generate"]
