# Writes the manual page, shortbus.1, of texts that people read elsewhere too: what --help prints, and the parts of
# Markdown pages that are named by title=, section= (all of the page where it is empty) before each page. See `make man`.

function inline(text,    out) {
    gsub(/\\\|/, "|", text)
    gsub(/\\/, "\\e", text)
    while (match(text, /\[[^]]*\]\([^)]*\)/)) {
        out = substr(text, RSTART + 1, RLENGTH - 2)
        text = substr(text, 1, RSTART - 1) substr(out, 1, index(out, "](") - 1) substr(text, RSTART + RLENGTH)
    }
    while (match(text, /`[^`]*`|\*\*[^*]*\*\*/)) {
        out = substr(text, RSTART, RLENGTH)
        gsub(/^(`|\*\*)|(`|\*\*)$/, "", out)
        text = substr(text, 1, RSTART - 1) "\\fB" out "\\fR" substr(text, RSTART + RLENGTH)
    }
    gsub(/-/, "\\-", text)
    return text ~ /^['.]/ ? "\\&" text : text
}

function example(text) {
    if (!in_example) print ".PP\n.RS 4\n.nf"
    in_example = 1
    print inline(text)
}

function end_example() {
    if (in_example) print ".fi\n.RE"
    in_example = 0
}

# A row of a table: its first cell is the tag, with the second where that is a status; the others have their header's name.
function row(    n, cells, tag, at, text) {
    n = split(substr($0, 3, length($0) - 4), cells, / \| /)
    if (!in_table) { for (at = 1; at <= n; at++) header[at] = cells[at]; in_table = 1; return }
    if ($0 ~ /^\|---/) return
    at = cells[1] ~ /^[0-9]+$/ ? 2 : 1
    tag = at == 2 ? cells[1] " " cells[2] : cells[1]
    print ".TP\n\\fB" inline(tag) "\\fR"
    while (++at <= n) {
        text = header[at] ~ /^(meaning|when|value)$/ ? cells[at] : header[at] (header[at] ~ /\?$/ ? " " : ": ") cells[at]
        print inline(toupper(substr(text, 1, 1)) substr(text, 2)) (text ~ /\.$/ || at == n ? "" : ".")
        if (at < n) print ".br"
    }
}

BEGIN { print ".TH SHORTBUS 1 \"\" \"shortbus " version "\" \"User Commands\"" }

FNR == 1 { end_example(); in_table = 0; taken = FILENAME ~ /help\.txt$/ || section == "" }

FILENAME ~ /help\.txt$/ {
    if (in_settings) next
    if (FNR == 1) {
        sub(/^shortbus: /, "")
        sub(/\.$/, "")
        print ".SH NAME\nshortbus \\- " inline($0)
        print ".SH SYNOPSIS\n.B shortbus\n[\\fB\\-\\-check\\fR | \\fB\\-\\-version\\fR | \\fB\\-\\-help\\fR]\n.SH DESCRIPTION"
    } else if ($0 == "By hand:") { end_example(); print ".SH OPTIONS" }
    else if (/^  --/) { print ".TP\n\\fB" inline($1) "\\fR"; sub(/^ *[^ ]+ +/, ""); print inline($0) }
    else if (/^  /) example(substr($0, 3))
    else if (/^It exits/) print ".SH EXIT STATUS\n" inline($0)
    else if (/^The web server sets/) in_settings = 1 # the settings' own page follows
    else if ($0 == "") { end_example(); print ".PP" }
    else print inline($0)
    next
}

/^#/ {
    end_example(); in_table = 0
    heading = $0
    sub(/^#+ /, "", heading)
    if (section != "") taken = heading == section
    if (FNR == 1 || heading == section) { if (taken) print ".SH " toupper(title) }
    else if (taken) print ".SS " inline(heading)
    next
}
!taken { next }
/^\|/ { row(); next }
/^    / && !in_item { example(substr($0, 5)); next }
{ end_example(); in_table = 0 }
/^- / || /^[0-9]+\. / { in_item = 1; print ".IP " ($1 == "-" ? "\\(bu 3" : $1 " 3"); sub(/^[^ ]+ /, ""); print inline($0); next }
/^$/ { in_item = 0; print ".PP"; next }
{ sub(/^ +/, ""); print inline($0) }

END {
    end_example()
    print ".SH SEE ALSO\nThe pages in \\fI/usr/share/doc/shortbus\\fR or \\fI/usr/local/share/doc/shortbus\\fR, with example configurations beside them;"
    print "\\fBmemcached\\fR(1), \\fBspawn\\-fcgi\\fR(1)"
}
