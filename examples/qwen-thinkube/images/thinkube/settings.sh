# shellcheck shell=bash disable=SC2034
# What start.sh serves, and how; rendered from the answers and the pin.
MODEL=Qwen/Qwen3-Embedding-0.6B
DEPLOYMENT=app
# /health while the model loads: what the LLM gateway, or the platform's probes, can bear.
LOADING_IS_HEALTHY=no
DEFAULT_TRACKING_URI=http://mlflow.mlflow.svc.cluster.local:5000
# Where MLflow's artifacts are, for pods without the mount. The password is in ADMIN_PASSWORD.
ARTIFACT_STORE=http://juicefs-mlflow-gateway.juicefs.svc.cluster.local:9001
ARTIFACT_STORE_USER=tkadmin
# TEI's flags; README.md says why each has its value.
FLAGS=(
  --pooling=last-token
  --dtype=float16
  --max-batch-tokens=32768
  --max-client-batch-size=128
  --max-concurrent-requests=1024
  --tokenization-workers=4
  --auto-truncate=true
  --payload-limit=2000000
  --json-output
)
