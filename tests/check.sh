#!/bin/sh
# All static checks, of the template's own code and of one rendered repository. Fast: run it before each commit.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%-12s %s\n' "$1" "$2"; }

say ruff "Python"
ruff check --quiet .
ruff format --quiet --check .
say mypy "types of extensions/"
mypy --no-error-summary
say yamllint "YAML"
yamllint --strict copier.yml extensions/data tests examples/shapes.yaml .github .yamllint.yaml

rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT
for platform in kubernetes thinkube; do
  for accelerator in gb10 cpu; do
    say render "$platform, $accelerator"
    shape=$([ "$accelerator" = cpu ] && echo app || echo component) # a component has a GPU
    python -W ignore -m copier copy --trust --defaults --quiet --vcs-ref=HEAD \
      --data platform="$platform" --data accelerator="$accelerator" --data thinkube_deployment="$shape" \
      --data 'components=[monitoring, gateway, ingress, network-policy, api-key]' \
      --data ci="$([ "$accelerator" = cpu ] && echo gitlab || echo github)" \
      . "$rendered/$platform-$accelerator" >/dev/null
  done
done
say yamllint "rendered YAML"
yamllint --strict --config-file .yamllint.yaml "$rendered"
say hadolint "rendered Dockerfiles"
find "$rendered" -name '*Dockerfile*' -type f -exec hadolint {} +
say shellcheck "shell"
find . "$rendered" \( -name .venv -o -name .cache -o -name .git -o -name node_modules -o -name .state \) -prune \
  -o -type f -name '*.sh' -print0 | xargs -0 shellcheck .ci/run .ci/release
echo "All checks passed."
