#!/bin/sh
# order.sh SHORTBUS MAP >order.ld: what requests under CGI run, as a linker script that lays it side by side. SHORTBUS has its
# symbols, MAP is what lld tells of it (-Map). Functions are named without what each compiler makes anew.
set -eu
shortbus=$1 map=$2 bus=order-$$
folder=$(mktemp -d)
trap 'kill "$memcached"; rm -rf "$folder" "/dev/shm/shortbus-$(id -u)/$bus" "/dev/shm/shortbus-$(id -u)/$bus:messages"' EXIT
memcached -u "$(id -un)" -s "$folder/memcached" &
memcached=$!
until [ -S "$folder/memcached" ]; do kill -0 $memcached; sleep 0.1; done

# request QUERY [BODY]: notes what it calls; its reply's body, which has to be no error.
request() {
    method=GET
    [ $# = 1 ] || method=POST
    printf %s "${2-}" | env -i SHORTBUS_BUS=$bus ${setting:+"$setting"} REQUEST_METHOD="$method" QUERY_STRING="$1" \
        CONTENT_LENGTH=${2:+${#2}} SCRIPT_NAME=/cgi-bin/chat SCRIPT_FILENAME=/cgi-bin/chat GATEWAY_INTERFACE=CGI/1.1 \
        SERVER_PROTOCOL=HTTP/1.1 HTTP_HOST=localhost REMOTE_ADDR=127.0.0.1 \
        valgrind -q --tool=callgrind --demangle=no --callgrind-out-file="$folder/calls.%p" "$shortbus" | tail -n 1 | grep -v '"error"'
    cat "$folder"/calls.* >>"$folder/all" && rm "$folder"/calls.*
}

for setting in "SHORTBUS_MEMCACHED=$folder/memcached" ""; do
    id=$(request "" | sed 's/.*"id":\([0-9]*\).*/\1/')
    request "user=1&id=$id"
    request "user=1" '{"text":"Hello, everyone!"}'
    request "user=2&id=$id"
    request "user=1&once=a" '"once"'
    request "user=1&once=a" '"once"'
    request "user=1&batch=1" '[1,"two"]'
done >&2

cat <<'END'
/* Made by `make order`. What a request under CGI runs, side by side: a process pays for each 64 KiB of the executable that
   it touches, which is what the kernel maps at a fault. A pattern that no longer matches breaks nothing. */
SECTIONS {
  .rodata.request : {
    *(.rodata.str1.* .rodata.cst*) *libc.a:libc-start.o(.rodata) *libc.a:dl-*.o(.rodata)
  }
} INSERT AFTER .rodata;
SECTIONS {
  .text.request : {
END
# The C library's part behind the crates', as every program begins and ends there, next to what the linker puts last.
awk '
    FNR == NR {
        if ($1 ~ /^c?fn=/ && $2 !~ /^0x/) {
            sub(/\x27.*/, "", $2)
            called[$2]
        }
        next
    }
    # ADDRESS ADDRESS SIZE ALIGN FILE:(SECTION), or SYMBOL behind those of its section.
    match($0, /:\(\.text[^)]*\)$/) {
        file = substr($5, 1, length($5) - RLENGTH)
        sub(/.*\//, "", file)
        section = substr($0, RSTART + 2, RLENGTH - 3)
        symbol = section
        sub(/^\.text\.(unlikely\.)?/, "", symbol)
        if (symbol in called)
            crates[section]
        next
    }
    $5 in called && file ~ /^lib[a-z_]*\.a\(/ {
        split(file, part, /[()]/)
        if (section == ".text")
            library["*" part[1] ":" part[2] "(.text)"]
        else {
            # One for each kind of processor: the newer ones.
            sub(/-.*/, "", part[2])
            library["*" part[1] ":" part[2] "-*vex*(.text.*)"]
            library["*" part[1] ":" part[2] "-avx*(.text.*)"]
        }
    }
    END {
        for (section in crates) {
            gsub(/17h[0-9a-f]*E/, "17h*", section)
            gsub(/Cs[0-9A-Za-z]*_/, "Cs*_", section)
            gsub(/\$/, "?", section)
            sub(/\.[0-9]+$/, "*", section)
            if (!seen[section]++) print "1    *(" section ")"
        }
        for (object in library)
            print "2    " object
    }
' "$folder/all" "$map" | LC_ALL=C sort | cut -c 2- | fmt -w 120
cat <<'END'
    /* What valgrind hides or does otherwise: the vDSO, and which string functions are the processor's. */
    *libc.a:dl-object.o(.text) *libc.a:dl-minimal.o(.text) *libc.a:dl-lookup.o(.text) *libc.a:dl-setup_hash.o(.text)
    *libc.a:memset-*vex*(.text.*) *libc.a:memset-avx*(.text.*) *libc.a:strcmp-*vex*(.text.*) *libc.a:strcmp-avx*(.text.*)
    *crt*.o(.text) KEEP(*(.init)) KEEP(*(.fini))
  }
} INSERT AFTER .text;
END
