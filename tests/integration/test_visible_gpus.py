"""Each actor uses its own GPU: Ray hides the others from it, or a run says that it does not. The GPUs are pretended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from tatar_dist.errors import UserError
from tatar_dist.run.process import check_visible_gpus


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # Ray takes no more GPUs than it shows
        ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, log_to_driver=False)
        yield
    ray.shutdown()


@pytest.mark.parametrize(("share", "shown"), [(0.5, {}), (2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})])
def test_an_actor_that_sees_other_gpus_than_its_own_is_refused(two_gpus, share, shown):
    look = ray.remote(num_cpus=0, num_gpus=share)(check_visible_gpus)
    assert ray.get(look.remote()) is None
    environment = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", **shown}
    with pytest.raises(UserError, match=r"Ray gave GPU [01,]+ to this process, which sees (all|0,1,2,3): unset"):
        ray.get(look.options(runtime_env={"env_vars": environment}).remote())


def test_a_process_without_gpus_of_ray_may_see_any(two_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    check_visible_gpus()
