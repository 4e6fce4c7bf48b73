"""Data residency: what stores tell of their region, and what a policy refuses."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.config import Config as BotoConfig

from gpumove.config import Config
from gpumove.errors import ConfigError, StoreError
from gpumove.move.regions import check_region
from gpumove.store.objects import Store
from tests.servers import Bucket
from tests.servers.proxy import Proxy
from tests.servers.s3 import KEY, SECRET


def opened(url: str, **options: Any) -> Store:
    return Store.open(url, Config(retry_s=60.0, deadline_s=30.0), options=options)


def s3_bucket(server: Bucket, name: str, region: str) -> None:
    client = botocore.session.Session().create_client(
        "s3", region_name=region, endpoint_url=server.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
        config=BotoConfig(s3={"addressing_style": "path"}, proxies={}),
    )  # fmt: skip
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    client.create_bucket(Bucket=name, **place)
    client.close()


@pytest.fixture(scope="module")
def frankfurt(s3_server: Bucket) -> str:
    s3_bucket(s3_server, "in-frankfurt", "eu-central-1")
    return "s3://in-frankfurt/runs/7"


def gcs_bucket(server: Bucket, name: str, **place: Any) -> Store:
    request = urllib.request.Request(
        f"{server.endpoint}/storage/v1/b?project=test",
        data=json.dumps({"name": name, **place}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()
    return opened(f"gs://{name}/run", **server.options)


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Store]:
    store = opened(str(tmp_path))
    yield store
    store.close()


def test_s3_tells_the_region_of_the_bucket(s3_server: Bucket, frankfurt: str) -> None:
    store = opened(frankfurt, **s3_server.options)
    assert store.regions() == ("eu-central-1",)
    assert check_region(store, "eu-*, us-gov-*") == ("eu-central-1",)
    assert check_region(store, "EU-Central-1", "eu-central-1") == ("eu-central-1",)
    with pytest.raises(ConfigError, match="in-frankfurt/runs/7 lies in eu-central-1, and only us-\\*") as caught:
        check_region(store, "us-*,europe-west4")
    assert caught.value.code == "config.region"
    with pytest.raises(ConfigError, match="lies in eu-central-1, as the store itself says, and not in us-east-2"):
        check_region(store, "us-*", "us-east-2")


def test_who_may_not_look_at_the_bucket_still_learns_its_region(s3_server: Bucket, frankfurt: str) -> None:
    stranger = opened(frankfurt, **{**s3_server.options, "key": "nobody", "secret": "none"})
    assert stranger.regions() == ("eu-central-1",)


def test_us_east_1_of_a_server_that_is_not_amazons_says_nothing(s3_server: Bucket) -> None:
    store = opened(s3_server.url, **s3_server.options)
    assert store.regions() == ()
    with pytest.raises(ConfigError, match=r"does not tell its region.*--to-region"):
        check_region(store, "us-*")
    assert check_region(store, "eu-*", "eu-own-rack") == ("eu-own-rack",)


def test_us_east_1_of_amazon_says_something(s3_server: Bucket) -> None:
    # Amazon's address, and the test server as the proxy on the way there.
    proxied = {"proxies": {"http": s3_server.endpoint}, "s3": {"addressing_style": "path"}}
    store = opened(
        s3_server.url, key=KEY, secret=SECRET, endpoint_url="http://s3.us-east-1.amazonaws.com", config_kwargs=proxied
    )
    assert store.regions() == ("us-east-1",)
    with pytest.raises(ConfigError, match="lies in us-east-1"):
        check_region(store, "eu-*")


def test_gcs_tells_all_regions_of_the_bucket(gcs_server: Bucket) -> None:
    one = gcs_bucket(gcs_server, "one-region", location="EUROPE-WEST4")
    assert check_region(one, "europe-west4") == ("europe-west4",)
    with pytest.raises(ConfigError, match="lies in europe-west4"):
        check_region(one, "eu-*")
    two = gcs_bucket(
        gcs_server, "two-regions", location="US",
        customPlacementConfig={"dataLocations": ["US-EAST1", "NORTHAMERICA-NORTHEAST1"]},
    )  # fmt: skip
    assert check_region(two, "us-*,northamerica-*") == ("us-east1", "northamerica-northeast1")
    with pytest.raises(ConfigError, match="lies in northamerica-northeast1, and only us"):
        check_region(two, "us-*")
    multi = gcs_bucket(gcs_server, "multi-region", location="EU")
    assert check_region(multi, "eu") == ("eu",)


def test_who_may_not_ask_google_is_asked_himself(gcs_server: Bucket) -> None:
    with Proxy(gcs_server.endpoint) as proxy:
        fault = proxy.fail("status", r"^GET /storage/v1/b/[^/]*\?", status=403)
        store = opened(gcs_server.url, **gcs_server.via(proxy.endpoint).options)
        with pytest.raises(ConfigError, match="does not tell its region"):
            check_region(store, "us-*")
        assert fault.fired == 1


def test_where_nobody_knows_a_person_has_to_say_it(nowhere: Store, azure_server: Bucket) -> None:
    for store in (nowhere, opened(azure_server.url, **azure_server.options), opened("memory://regions")):
        with pytest.raises(ConfigError, match=r"does not tell its region, and only eu-\* is allowed"):
            check_region(store, "eu-*")
        assert check_region(store, "eu-*", "eu-west-9") == ("eu-west-9",)
        with pytest.raises(ConfigError, match="lies in mars-1"):
            check_region(store, "eu-*", "eu-west-9,mars-1")


def test_without_a_policy_nothing_is_asked() -> None:
    store = opened("s3://no-such-bucket", endpoint_url="http://127.0.0.1:1", key="a", secret="b")
    assert check_region(store, "") == check_region(store, " , ") == ()


def test_a_store_that_cannot_be_asked_is_refused(s3_server: Bucket) -> None:
    with pytest.raises(StoreError) as caught:
        check_region(opened("s3://no-such-bucket/x", **s3_server.options), "eu-*")
    assert caught.value.code == "store.no_bucket"


def test_the_policy_is_a_setting() -> None:
    assert Config.from_env({"GPUMOVE_ALLOWED_REGIONS": "eu-*, europe-west4"}).allowed_regions == "eu-*, europe-west4"
    with pytest.raises(ConfigError, match="allowed_regions takes patterns"):
        Config(allowed_regions="eu west")
