#!/bin/sh
# licences.sh TARGET: prints the licences of all that is linked into the executable, as the crates themselves hold them;
# of a crate that offers several, MIT's.
set -eu
echo "shortbus itself is under the licence in the file LICENSE. The executable also holds:"
echo
echo "- Rust's standard library, MIT or Apache-2.0: https://github.com/rust-lang/rust"
echo "- the C library it was linked with. GNU's is under LGPL-2.1, on Debian in /usr/share/common-licenses/LGPL-2.1; with"
echo "  the source of shortbus, make links it with another one."
echo "- these crates:"
files=$(mktemp)
trap 'rm -f "$files"' EXIT
packages=$(cargo metadata --format-version 1 --locked --filter-platform "$1" |
    tr -d '\n' | sed 's/"manifest_path":"/\n&/g' | sed -n 's/^"manifest_path":"\([^"]*\)\/Cargo.toml".*/\1/p')
# Not in the pipe, where a failure would not be seen.
crates=$(cargo tree --locked --target "$1" --edges normal,no-proc-macro --prefix none --no-dedupe --format '{p} {l}')
echo "$crates" | LC_ALL=C sort -u | while read -r name version licence; do
    [ "$name" != shortbus ] || continue
    # Under no other terms than these may the executable be handed on without a thought.
    case $licence in
    MIT | "MIT OR "* | MIT/* | *" OR MIT" | Unicode-3.0) ;;
    *) echo "$name is under $licence" >&2; exit 1 ;;
    esac
    folder=$(echo "$packages" | grep "/$name-${version#v}$")
    printf '\n%s\n%s %s, %s\n\n' "$(printf '%080d' 0 | tr 0 =)" "$name" "$version" "$licence"
    find "$folder" -maxdepth 1 -type f \( -iname 'licen[cs]e*' -o -iname 'copying*' -o -iname 'notice*' \) >"$files"
    [ -s "$files" ] || { echo "No licence in $folder" >&2; exit 1; }
    { grep -i 'mit[^/]*$' "$files" || LC_ALL=C sort "$files"; } | while read -r file; do cat "$file"; echo; done
done
