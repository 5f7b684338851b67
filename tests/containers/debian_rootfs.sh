#!/bin/sh
# Makes the root file system of a small Debian, as a tar file that `docker import` and `buildah add` take.
#
#   debian_rootfs.sh FOLDER PACKAGE[,PACKAGE]... [RELEASE]    prints the path of the tar file
#
# A tar file with the same packages that FOLDER already holds is kept.
set -eu

folder=$1 packages=$2
release=${3:-bookworm}
tar="$folder/$release-$(printf '%s' "$packages" | sha256sum | cut -c 1-12).tar"

if [ ! -e "$tar" ]; then
    mkdir -p "$folder"
    root=$(mktemp -d "$folder/rootfs.XXXXXX")
    trap 'rm -rf "$root"' EXIT
    if ! debootstrap --variant=minbase --include="$packages" "$release" "$root" >"$folder/debootstrap.log" 2>&1; then
        echo "debian_rootfs.sh: debootstrap failed: $(tail -n 1 "$folder/debootstrap.log")" >&2
        exit 1
    fi
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc "$root"/usr/share/locale
    tar -C "$root" -cf "$tar.part" .
    mv "$tar.part" "$tar"
fi
echo "$tar"
