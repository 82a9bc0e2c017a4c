#!/bin/sh
# needs.sh COMMAND...: where a command is missing, installs the package that brings it (Debian, Ubuntu), or says
# what to install (elsewhere). Silent, quick and without root where nothing is missing.
set -eu
PATH=$PATH:/usr/sbin:/sbin # the daemons' place, which a user's PATH leaves out

have() {
    case $1 in
        # With the C library to link statically: it is a package of its own, and gcc answers with a path if it is there.
        cc) case $(cc -print-file-name=libc.a) in /*) ;; *) false ;; esac ;;
        apache2) command -v apache2 || command -v httpd ;;
        chromium) command -v chromium || command -v chromium-browser || command -v google-chrome ;;
        firefox-esr) command -v firefox-esr || command -v firefox ;;
        mod_evasive) [ -e /usr/lib/apache2/modules/mod_evasive20.so ] || [ -e /usr/lib64/httpd/modules/mod_evasive24.so ] ;;
        mod_fcgid) [ -e /usr/lib/apache2/modules/mod_fcgid.so ] || [ -e /usr/lib64/httpd/modules/mod_fcgid.so ] ;;
        *) command -v "$1" ;;
    esac >/dev/null 2>&1
}

package() {
    case $1/$2 in
        apt-get/cc) echo gcc libc6-dev ;;
        dnf/cc) echo gcc glibc-static ;;
        apk/cc) echo gcc musl-dev ;;
        pacman/cc) echo gcc ;;
        apt-get/apache2) echo apache2-bin ;; # the server and its modules without a system service
        dnf/apache2) echo httpd ;;
        pacman/apache2) echo apache ;;
        apt-get/mod_fcgid) echo libapache2-mod-fcgid ;;
        # It wants a command mail, and that one that delivers: msmtp runs no service.
        apt-get/mod_evasive) echo libapache2-mod-evasive msmtp-mta ;;
        */systemd-socket-activate) echo systemd ;;
        dnf/firefox-esr | pacman/firefox-esr) echo firefox ;;
        dnf/ip) echo iproute ;;
        */ip) echo iproute2 ;;
        */node) echo nodejs ;;
        */dpkg-deb) echo dpkg ;;
        */man) echo man-db ;;
        pacman/python3) echo python ;;
        apt-get/php | dnf/php) echo php-cli ;;
        dnf/npm) echo nodejs-npm ;;
        *) echo "$2" ;;
    esac
}

missing=
for command; do
    have "$command" || missing="$missing $command"
done
[ "$missing" ] || exit 0

for manager in apt-get dnf apk pacman ''; do
    [ -z "$manager" ] || ! command -v "$manager" >/dev/null || break
done
packages=
for command in $missing; do
    packages="$packages $(package "$manager" "$command")"
done
case $manager in
    apt-get) line="apt-get install --no-install-recommends$packages" ;;
    dnf) line="dnf install$packages" ;;
    apk) line="apk add$packages" ;;
    pacman) line="pacman -S$packages" ;;
    *) line="install what brings these commands, by your system's ways" ;;
esac
if [ "$manager" != apt-get ] || { [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; }; then
    echo "Missing here:$missing. As root: $line" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "Missing here:$missing. Trying: sudo $line" >&2
    exec sudo sh "$0" "$@"
fi

# Nobody asked for nginx on port 80: this keeps dpkg from starting services, by the hook Debian has for it. It says
# no only while this script runs, so that one left behind by a kill -9 stops nothing.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\n[ ! -d /proc/%s ] || exit 101\n' $$ >$policy
    chmod +x $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2 || : # one broken source need not matter; if it does, the next line fails
# shellcheck disable=SC2086 # words
apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 $packages >&2
for command in $missing; do
    have "$command" || { echo "Still missing after $line: $command" >&2; exit 1; }
done
