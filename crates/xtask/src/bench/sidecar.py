#!/usr/bin/env python3
"""The reference's configuration with what Istio's sidecars have beside it: the direction that makes our proxy count Istio's
metrics (Envoy from PyPI has no such filter), a DENY and an ALLOW policy, and Istio's access log, written to nowhere.

It stands in for the reference's `gen_envoy.py`, which is `plain.py` here, and takes its arguments."""
import json
import os
import subprocess
import sys

TYPES = "type.googleapis.com/envoy.extensions."
LOG = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% '
    '%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% '
    '%BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" '
    '"%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% '
    "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)


def rule(*alternatives):
    return {"or_rules": {"rules": list(alternatives)}}


def policy(*rules):
    anyone = {"and_ids": {"ids": [{"any": True}]}}
    return {"permissions": [{"and_rules": {"rules": list(rules)}}], "principals": [anyone]}


def path(prefix):
    return {"url_path": {"path": {"prefix": prefix}}}


def method(name):
    return {"header": {"name": ":method", "string_match": {"exact": name}}}


def rbac(action, policies):
    config = {"@type": TYPES + "filters.http.rbac.v3.RBAC", "rules": {"action": action, "policies": policies}}
    return {"name": "envoy.filters.http.rbac", "typed_config": config}


DENY = {"ns[default]-policy[deny]-rule[0]": policy(rule(path("/admin")))}
ALLOW = {
    f"ns[default]-policy[allow]-rule[{index}]": policy(rule(method(name)), rule(path("/")))
    for index, name in enumerate(["PUT", "DELETE", "GET"])
}

plain = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plain.py")
config = json.loads(subprocess.check_output([sys.executable, plain, *sys.argv[1:]]))
listener = config["static_resources"]["listeners"][0]
listener["traffic_direction"] = "INBOUND"
manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
manager["http_filters"][:0] = [rbac("DENY", DENY), rbac("ALLOW", ALLOW)]
sink = {
    "@type": TYPES + "access_loggers.file.v3.FileAccessLog",
    "path": "/dev/null",
    "log_format": {"text_format_source": {"inline_string": LOG}},
}
manager["access_log"] = [{"name": "envoy.access_loggers.file", "typed_config": sink}]
json.dump(config, sys.stdout)
