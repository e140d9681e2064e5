#!/usr/bin/env bash
# The same from a shell: curl.sh models | devices | history NAME | enable NAME | disable NAME |
# drain NAME | swap OLD NEW | rollback NAME. What comes is JSON, or a line that says what was
# reached; exit status 1 where it failed.
#
#   SYNAPSE_URL            where supervisord answers (http://host.docker.internal:9001/RPC2)
#   SYNAPSE_USER           as in [inet_http_server] (synapse)
#   SYNAPSE_PASSWORD_FILE  a file with the password (/run/secrets/synapse_password)
set -euo pipefail

url=${SYNAPSE_URL:-http://host.docker.internal:9001/RPC2}
user=${SYNAPSE_USER:-synapse}
password_file=${SYNAPSE_PASSWORD_FILE:-/run/secrets/synapse_password}
longest_seconds=600

# The password goes to curl by its standard input: a command line can be read by everybody.
login() {
    local password
    password=$(sed 's/[\\"]/\\&/g' "$password_file")
    printf 'user = "%s:%s"\n' "$user" "$password"
}

escaped() { printf %s "$1" | sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g'; }

unescaped() { sed 's/&lt;/</g; s/&gt;/>/g; s/&quot;/"/g; s/&amp;/\&/g'; }

# call METHOD PARAMETER ...   A parameter is text, or int:NUMBER.
call() {
    local method=$1 parameters="" parameter answer
    shift
    for parameter in "$@"; do
        case $parameter in
            int:*) parameter="<int>${parameter#int:}</int>" ;;
            *) parameter="<string>$(escaped "$parameter")</string>" ;;
        esac
        parameters+="<param><value>$parameter</value></param>"
    done
    answer=$(login | curl --silent --show-error --fail --config - --noproxy '*' --max-time 10 \
        --retry 3 --header 'Content-Type: text/xml' \
        --data "<?xml version='1.0'?><methodCall><methodName>synapse.$method</methodName><params>$parameters</params></methodCall>" \
        "$url" | tr -d '\n') || return 1
    if [[ $answer == *"<fault>"* ]]; then
        printf '%s\n' "$answer" | sed 's/.*<string>\(.*\)<\/string>.*/\1/' | unescaped >&2
        return 1
    fi
    printf '%s\n' "$answer" | sed 's/.*<string>\(.*\)<\/string>.*/\1/; s/.*<string\/>.*//' | unescaped
}

# carry_out VERB PARAMETER ...   With a key it is one command, however often curl has to try.
carry_out() {
    local id answer="" waited
    id=$(call "$@" "$(date +%s)-$$-$RANDOM$RANDOM") || return 1
    for ((waited = 0; waited < longest_seconds; waited++)); do
        answer=$(call result "$id") || return 1
        [[ -n $answer ]] && break
        sleep 1
    done
    printf '%s\n' "${answer:-it still waits}"
    [[ $answer == '{"ok": true'* ]]
}

case "${1-}:$#" in
    models:1 | devices:1) call "$1" ;;
    history:2) call history "$2" int:20 ;;
    enable:2 | disable:2 | drain:2) carry_out "$1" "$2" ;;
    swap:3) carry_out swap "$2" "$3" ;;
    rollback:2) carry_out rollback "$2" int:0 ;;
    *) sed -n '2,4p' "$0" >&2; exit 2 ;;
esac
