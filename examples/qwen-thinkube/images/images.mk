# The images: each, or all of them. scripts/images.py does it, for linux/arm64.

# docker, podman or buildah; the first that answers when it is empty.
BUILDER ?=
# Arguments of every build, as in BUILD_ARGS="--build-arg HTTPS_PROXY=http://proxy.example.com:3128", and of one.
BUILD_ARGS ?=
TEI_BUILD_ARGS ?=
MODEL_FETCH_BUILD_ARGS ?=
SMOKE_BUILD_ARGS ?=
# FORCE=1 builds what is unchanged since it was pushed, for newer base images.
FORCE ?=
# EMULATE=1 builds on a machine of another platform, where the builder emulates it.
EMULATE ?=
# More words for cosign, as in COSIGN_ARGS="--key cosign.key".
COSIGN_ARGS ?=
export BUILDER BUILD_ARGS TEI_BUILD_ARGS MODEL_FETCH_BUILD_ARGS SMOKE_BUILD_ARGS FORCE EMULATE COSIGN_ARGS

IMAGES = python3 scripts/images.py

.PHONY: image push sbom sign
image: ## Build the images that changed since they were pushed
	@$(IMAGES) build

push: ## Push them, and write their digests to deploy/images
	@$(IMAGES) push

sbom: ## List what is in all images, as SPDX
	@$(IMAGES) sbom

sign: ## Sign the images that were pushed, with cosign
	@$(IMAGES) sign

.PHONY: tei-image tei-push
tei-image tei-push:
	@echo "Nothing to build: ghcr.io/huggingface/text-embeddings-inference:121-1.9.4@sha256:a8f7f1b33b18a8a8d87b9f16268803ce83c9b4dd33fc05424b3b5375bf18c85c is Hugging Face's own image, and the cluster pulls it from there."

.PHONY: model-fetch-image model-fetch-push
model-fetch-image: ## Build model-fetch, the init container
	@$(IMAGES) build model-fetch

model-fetch-push: ## Push model-fetch, the init container
	@$(IMAGES) push model-fetch

.PHONY: smoke-image smoke-push
smoke-image: ## Build the smoke test's image
	@$(IMAGES) build smoke

smoke-push: ## Push the smoke test's image
	@$(IMAGES) push smoke
