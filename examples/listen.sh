#!/bin/sh
# listen.sh URL: prints what is published on a bus, one poll a line, for as long as it runs. Needs curl 7.84.
set -u
id='' reply='' headers='\n%header{shortbus-missed}\n%header{shortbus-last-id}'
while :; do
    if [ -z "$id" ]; then
        id=$(curl -sS -f "$1" | sed -n 's/.*"id":\([0-9]*\).*/\1/p')
        [ "$id" ] || sleep 5
    elif reply=$(curl -sS -f --max-time 60 -w "$headers" "$1?id=$id&wait=25"); then
        id=$(printf '%s\n' "$reply" | tail -n 1)
        [ -z "$(printf '%s\n' "$reply" | tail -n 2 | head -n 1)" ] || echo "Some messages were missed." >&2
        # Where nothing is new, or the bus does not wait, the next poll has time.
        case $reply in '[]'*) sleep 1 ;; *) printf '%s\n' "$reply" | head -n -2 ;; esac
    else
        sleep 5
    fi
done
