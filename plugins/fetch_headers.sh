#!/bin/sh
# Puts ONNX Runtime's headers into a folder: plugins/fetch_headers.sh build/onnxruntime
#
# Takes Debian's libonnxruntime-dev (headers and CMake files alone; nothing is installed), from this
# release's index, or from the next release's where this one does not have it. Needs apt and, for
# the indexes, the network. Prints the folder to give as ONNXRUNTIME_INCLUDE_DIR.
set -eu

package=libonnxruntime-dev
release=bookworm # the last without the package
next=trixie

target=${1:?usage: fetch_headers.sh FOLDER}
mkdir -p "$target"
target=$(cd "$target" && pwd)
include="$target/usr/include/onnxruntime"
if [ -e "$include/onnxruntime_cxx_api.h" ]; then
    echo "$include"
    exit 0
fi

if ! command -v apt-get >/dev/null; then
    echo "fetch_headers.sh: no apt-get here; get ONNX Runtime's headers yourself" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/sources.d" "$work/lists/partial" "$work/cache/archives/partial"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list \
    /etc/apt/sources.list.d/*.sources; do
    [ -s "$file" ] && sed "s/$release/$next/g" "$file" >"$work/sources.d/$(basename "$file")"
done

# Our own lists and cache: the machine's stay as they are.
apt() {
    apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources.d" \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User="$(id -un)" "$@" >&2
}
apt update
(cd "$work" && apt download "$package")
dpkg -x "$work/$package"_*.deb "$target"
echo "$include"
