# The images: each, or all of them. scripts/images.py does it, for linux/amd64.

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

push: ## Push them, and write their digests to k8s/images
	@$(IMAGES) push

sbom: ## List what is in all images, as SPDX
	@$(IMAGES) sbom

sign: ## Sign the images that were pushed, with cosign
	@$(IMAGES) sign

.PHONY: tei-image tei-push
tei-image: ## Build TEI, the server
	@$(IMAGES) build tei

tei-push: ## Push TEI, the server
	@$(IMAGES) push tei

.PHONY: tei-image-in-cluster tei-digest
tei-image-in-cluster: ## Build TEI on a node of the cluster and push it
	@kubectl --namespace bge-build get secret bge-registry >/dev/null || { echo "The builder logs in to the registry with the Secret bge-registry: create it as images/tei/README.md says." >&2; exit 1; }
	kubectl --namespace bge-build delete job bge-tei-build --ignore-not-found
	kubectl apply -k k8s/build
	@sh k8s/build/started.sh bge-build bge-tei-build
	@echo "Takes hours at worst. Follow it with: kubectl --namespace bge-build logs --follow job/bge-tei-build"
	@echo "When it has ended: make tei-digest"

tei-digest: ## Write the digest of what the cluster built to k8s/images
	@DIGEST="$$(kubectl --namespace bge-build get pods --selector job-name=bge-tei-build --output 'jsonpath={.items[0].status.containerStatuses[0].state.terminated.message}')" $(IMAGES) digest tei

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
