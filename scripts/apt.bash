# For scripts that fetch Debian packages: an apt beside the machine's own. Sourced; the script defines say and die.

# progress passes on what apt gets, not what it thinks; errors come on stderr by themselves.
progress() { sed -n '/^\(Get\|Fetched\|Ign\)/p' >&2; }

# sources SUITE TYPES prints the deb822 sources of this machine's Debian mirrors with their suites' code name changed to SUITE.
# TYPES: deb, or "deb deb-src".
sources() {
	local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	[ -r "$keyring" ] || die "$keyring is missing: install debian-archive-keyring"
	local stanza='Types: %s\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n'
	if [ -n "${STUBINIT_MIRROR:-}" ]; then
		printf "$stanza" "$2" "$STUBINIT_MIRROR" "$1" "$keyring"
		return
	fi
	local host
	host=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	# Both source formats become lines "suite uri components… [signed-by]"; then the ones that are Debian's are kept.
	{
		find /etc/apt/sources.list.d -name '*.sources' -exec awk '
			function flush(  i, j, s, u, n, m) {
				if (f["types"] ~ /(^| )deb( |$)/ && tolower(f["enabled"]) != "no") {
					n = split(f["suites"], s, " "); m = split(f["uris"], u, " ")
					for (i = 1; i <= n; i++) for (j = 1; j <= m; j++)
						print s[i], u[j], " " f["components"] " ", "key=" f["signed-by"]
				}
				split("", f); key = ""
			}
			FNR == 1 { flush() }
			/^[ \t]*$/ { flush(); next }
			/^#/ { next }
			/^[ \t]/ { if (key != "") f[key] = f[key] " " $0; next }
			{ i = index($0, ":"); key = tolower(substr($0, 1, i - 1)); f[key] = substr($0, i + 1); gsub(/^[ \t]+|[ \t]+$/, "", f[key]) }
			END { flush() }' {} +
		find /etc/apt/sources.list /etc/apt/sources.list.d -name '*.list' -exec awk '
			$1 == "deb" {
				key = ""
				if ($2 ~ /^\[/) {
					while (match($0, /\[[^]]*\]/) == 0 && (getline more) > 0) $0 = $0 more
					key = substr($0, RSTART, RLENGTH); $0 = substr($0, 1, RSTART - 1) substr($0, RSTART + RLENGTH)
				}
				sub(/#.*/, "")
				comps = " "; for (i = 4; i <= NF; i++) comps = comps $i " "
				print $3, $2, comps, "key=" key
			}' {} + 2>/dev/null || : # either place may be missing
	} | awk -v host="$host" '
		/ main / && (/key=.*debian-archive/ || (/key=$/ && $2 ~ /debian/)) {
			base = $1; sub(/[-\/].*/, "", base)
			if (base == host || base == "stable" || base == "oldstable" || base == "testing")
				print $2, substr($1, length(base) + 1)
		}' | sort -u | while read -r uri suffix; do
		printf "$stanza" "$2" "$uri" "$1$suffix" "$keyring"
	done
}

# own_apt SUITE TYPES STATE ARCHIVES makes apt use lists and status below STATE and downloads in ARCHIVES, by exporting APT_CONFIG.
own_apt() {
	mkdir -p "$3/lists/partial" "$4/partial"
	sources "$1" "$2" >"$3/debian.sources"
	[ -s "$3/debian.sources" ] ||
		die "no Debian mirror in /etc/apt/sources.list or sources.list.d: name one with STUBINIT_MIRROR=URL"
	: >"$3/status"
	{
		# This machine's proxies and the like hold here too; its hooks (which may empty caches) do not.
		apt-config dump | grep -E '^Acquire::(https?|ftp|Retries|ForceIPv|AllowInsecure|Check-)' || :
		cat <<-CONF
			Dir::State "$3";
			Dir::State::lists "$3/lists";
			Dir::State::status "$3/status";
			Dir::Cache "$3";
			Dir::Cache::archives "$4";
			Dir::Etc::main "/dev/null";
			Dir::Etc::parts "/dev/null";
			Dir::Etc::sourcelist "$3/debian.sources";
			Dir::Etc::sourceparts "/dev/null";
			Dir::Etc::preferences "/dev/null";
			Dir::Etc::preferencesparts "/dev/null";
			APT::Architecture "amd64";
			APT::Architectures { "amd64"; };
			APT::Install-Recommends "false";
			APT::Sandbox::User "";
			Acquire::Languages "none";
			Acquire::Retries "3";
			DPkg::Use-Pty "false";
		CONF
	} >"$3/apt.conf"
	export APT_CONFIG=$3/apt.conf
}

# debs PACKAGE... prints the file names of what would be installed, what the packages depend on included.
debs() {
	# The simulation names the set: Inst NAME (VERSION ARCHIVE [ARCH]).
	apt-get -q -y --simulate install "$@" |
		sed -nE 's/^Inst ([^ ]+) \(([^ ]+) .*\[([a-z0-9]+)\]\).*/\1 \2 \3/p' |
		while read -r name version arch; do
			echo "$(sed 's/:.*//' <<<"$name")_${version//:/%3a}_$arch.deb"
		done | sort
}
