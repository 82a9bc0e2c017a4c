#!/bin/bash
# make demo: a bus to try until Ctrl-C, with a private Apache in a temporary folder, on a free port of this host alone;
# and with a private memcached where there is one to start, else in a file in that folder. It runs as any user, beside other servers and other demos.
# shellcheck disable=SC2086,SC2317 # process ids and options that may be none; a function for trap
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin # the daemons' place, which a user's PATH leaves out
[ -x cgi-bin/shortbus ] || { echo "Nothing to show yet: run make first." >&2; exit 1; }

dir='' memcached='' apache=''
finish() {
    trap '' HUP INT TERM # a second Ctrl-C must not leave half of it behind
    set +e
    for pid in $apache $memcached; do kill $pid 2>/dev/null; done
    # Each leads a process group, its children in it; a busy server gets five seconds to end by itself.
    for _ in {1..100}; do
        kill -0 $apache $memcached 2>/dev/null || break
        sleep 0.05
    done
    for pid in $apache $memcached; do kill -KILL -- -$pid 2>/dev/null; done
    wait
    [ -z "$dir" ] || rm -rf "$dir"
}
trap finish EXIT
trap 'echo; exit 0' INT # the way to end it, so no failure
trap 'exit 143' TERM
trap 'exit 129' HUP
trap 'exit 141' PIPE # make demo | head

fail() {
    echo "shortbus demo: $1" >&2
    tail -n 20 "$dir"/*.log >&2
    exit 1
}

watch() {
    [ -z "$memcached" ] || kill -0 $memcached 2>/dev/null || fail "memcached has ended:"
    kill -0 $apache 2>/dev/null || fail "Apache has ended:"
}

# In /tmp, wherever TMPDIR is: short enough for a unix socket's path, and within the reach of another user.
dir=$(mktemp -d /tmp/shortbus-demo.XXXXXX)
mkdir "$dir/cgi-bin" "$dir/run"
install -m 755 cgi-bin/shortbus "$dir/cgi-bin/chat"
as_user='' user_lines=''
if [ "$(id -u)" -eq 0 ]; then
    # Both daemons want another user to become; CGI programs then run as that user too.
    user=$(id -un www-data 2>/dev/null || id -un apache 2>/dev/null || echo nobody)
    chown "$user" "$dir/run"
    chmod 755 "$dir" "$dir/cgi-bin" "$dir/run"
    as_user="-u $user"
    user_lines="User $user"$'\n'"Group \"#$(id -g "$user")\""
fi

# setsid: the terminal's signals are for this script. Apache would take a resized window (SIGWINCH) for "stop".
if [ -x "$(command -v memcached)" ]; then
    setsid memcached -m 16 -s "$dir/run/memcached" $as_user </dev/null >"$dir/memcached.log" 2>&1 &
    memcached=$!
    store="SHORTBUS_MEMCACHED \"$dir/run/memcached\""
    lives='in a memcached of its own'
else
    store="SHORTBUS_STORE \"$dir/run\""
    lives="in the file $dir/run/chat:messages"
fi

for modules in /usr/lib/apache2/modules /usr/lib64/httpd/modules /usr/lib/httpd/modules /usr/lib/apache2; do
    [ ! -e $modules/mod_cgid.so ] || break
done
start_apache() {
    cat >"$dir/apache.conf" <<CONF
ServerRoot "$dir"
ServerName 127.0.0.1
Listen 127.0.0.1:$port
PidFile apache.pid
ErrorLog apache.log
DefaultRuntimeDir "$dir"
$(for name in mpm_event unixd authz_core alias env cgid; do
    echo "<IfModule !${name}_module>"
    echo "LoadModule ${name}_module $modules/mod_$name.so"
    echo "</IfModule>"
done)
$user_lines
<Directory />
    Require all denied
</Directory>
SetEnv $store
Define SHORTBUS_CGI_BIN "$dir/cgi-bin"
Include "$PWD/apache-example.conf"
CONF
    setsid "$(command -v apache2 || command -v httpd)" -f "$dir/apache.conf" -DFOREGROUND >"$dir/apache-start.log" 2>&1 &
    apache=$!
}

# Nobody can reserve a port for Apache: it takes one by chance, and the next where that is in use. Below 32768,
# where Linux takes the ports of outgoing connections from.
for _ in {1..20}; do
    port=$((20000 + RANDOM % 12000))
    start_apache
    # The PID file comes after the port: once it names our Apache, nobody else's server answers there.
    until [ "$(cat "$dir/apache.pid" 2>/dev/null)" = $apache ]; do
        kill -0 $apache 2>/dev/null || break
        sleep 0.05
    done
    if kill -0 $apache 2>/dev/null; then break; fi
    grep -q AH00072 "$dir/apache-start.log" || fail "Apache does not start:" # AH00072: could not bind
done
bus=http://127.0.0.1:$port/cgi-bin/chat
for _ in {1..200}; do
    watch
    if curl --noproxy '*' -sfo /dev/null "$bus"; then break; fi
    sleep 0.05
done
curl --noproxy '*' -sSfo /dev/null "$bus" || fail "the bus does not answer:"

cat <<LINES

The bus lives $lives.
Open $bus/ in a browser: a page to try the bus on, until you press Ctrl-C here.
Or paste these lines into another terminal, and two users talk on it:

    BUS=$bus
    ID=\$(curl -s "\$BUS" | sed 's/.*"id":\\([0-9]*\\).*/\\1/')
    curl -sw '\\n' "\$BUS?user=1" -d '"Is anyone here?"'
    curl -sw '\\n' "\$BUS?user=2&id=\$ID"
    curl -sw '\\n' "\$BUS?user=2" -d '{"text": "I am", "tea": true}'
    curl -sw '\\n' "\$BUS?user=1&id=\$ID"

The first joins, to learn where the bus is now. User 1 publishes, user 2 polls and hears it, and answers; then
user 1 polls, and hears the answer alone.
LINES

while watch; do sleep 0.5; done
