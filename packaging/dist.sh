#!/bin/sh
# dist.sh VERSION TARGET PAGE...: makes of what `make` has built, in the folder dist, shortbus-VERSION-linux-ARCH.tar.gz and
# shortbus_VERSION-1_ARCH.deb, each with its SHA-256. The same files give the same bytes: every time in them is the
# release's, as CHANGELOG.md has it.
set -eu
version=$1 target=$2
shift 2
arch=${target%%-*}
released=$(sed -n "s/^## $version (\(.*\))$/\1/p" CHANGELOG.md)
# What is not released yet has no day.
SOURCE_DATE_EPOCH=$(date -u -d "${released:-2000-01-01}" +%s)
export SOURCE_DATE_EPOCH
umask 022
rm -rf dist
mkdir dist
trap 'rm -rf dist/tree dist/deb' EXIT

name=shortbus-$version-linux-$arch
mkdir -p "dist/tree/$name/cgi-bin"
cp cgi-bin/shortbus "dist/tree/$name/cgi-bin"
cp -R "$@" "dist/tree/$name"
packaging/licences.sh "$target" >"dist/tree/$name/LICENSES-OF-CRATES"
chmod -R u=rwX,go=rX dist/tree
tar -C dist/tree --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" --format=ustar \
    -I 'gzip -9n' -cf "dist/$name.tar.gz" "$name"

case $arch in
    x86_64) architecture=amd64 ;;
    aarch64) architecture=arm64 ;;
    armv7 | arm) architecture=armhf ;;
    *) architecture=$arch ;;
esac
make --no-print-directory -s install DESTDIR=dist/deb prefix=/usr
doc=dist/deb/usr/share/doc/shortbus
# Debian's ways with them: https://www.debian.org/doc/debian-policy/ch-docs.html
gzip -9n dist/deb/usr/share/man/man1/shortbus.1
gzip -9nc CHANGELOG.md >$doc/changelog.gz
{
    echo "shortbus ($version-1) unstable; urgency=medium"
    printf '\n  * See /usr/share/doc/shortbus/CHANGELOG.md.\n\n'
    echo " -- the shortbus authors <shortbus@shortbus.invalid>  $(date -uR -d "@$SOURCE_DATE_EPOCH")"
} | gzip -9nc >$doc/changelog.Debian.gz
{
    cat LICENSE
    echo
    cat "dist/tree/$name/LICENSES-OF-CRATES"
} >$doc/copyright
rm $doc/LICENSE
install -d dist/deb/usr/share/lintian/overrides dist/deb/DEBIAN
echo "shortbus: statically-linked-binary [usr/bin/shortbus]" >dist/deb/usr/share/lintian/overrides/shortbus
install -m 755 packaging/postinst packaging/prerm packaging/postrm dist/deb/DEBIAN
cat >dist/deb/DEBIAN/control <<END
Package: shortbus
Version: $version-1
Architecture: $architecture
Maintainer: the shortbus authors <shortbus@shortbus.invalid>
Installed-Size: $(du -sk --apparent-size dist/deb/usr | cut -f1)
Suggests: apache2 | nginx | lighttpd, memcached
Section: web
Priority: optional
Description: message bus for browser pages, for CGI and FastCGI
 Whatever one page publishes on a bus, all other pages on it hear, in one
 order. Link this executable into a web server's cgi-bin, and the link's name
 is a bus: ln -s /usr/bin/shortbus /usr/lib/cgi-bin/chat
 .
 Messages are JSON and live for a minute, in memcached or in a file of the
 host. Browsers get their client, and a page to try the bus, from the bus
 itself.
END
(cd dist/deb && find usr -type f | LC_ALL=C sort | xargs md5sum) >dist/deb/DEBIAN/md5sums
chmod -R u=rwX,go=rX dist/deb
dpkg-deb -Zxz --root-owner-group --build dist/deb "dist/shortbus_$version-1_$architecture.deb" >/dev/null

cd dist
for file in *.tar.gz *.deb; do
    sha256sum "$file" >"$file.sha256"
    cat "$file.sha256"
done
