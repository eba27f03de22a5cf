"""Functions of PostgreSQL by what the router has to know of them."""

from __future__ import annotations

from typing import Final

AGGREGATES: Final = frozenset(
    """
    any_value array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp cume_dist
    dense_rank every json_agg json_agg_strict json_arrayagg json_object_agg json_object_agg_strict
    json_object_agg_unique json_object_agg_unique_strict json_objectagg jsonb_agg jsonb_agg_strict
    jsonb_object_agg jsonb_object_agg_strict jsonb_object_agg_unique jsonb_object_agg_unique_strict max min mode
    percent_rank percentile_cont percentile_disc range_agg range_intersect_agg rank regr_avgx regr_avgy
    regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy stddev stddev_pop stddev_samp
    string_agg sum var_pop var_samp variance xmlagg
    """.split()  # noqa: SIM905
)
WINDOW: Final = frozenset(
    """
    row_number ntile lag lead first_value last_value nth_value
    """.split()  # noqa: SIM905
)

SCALAR: Final = frozenset(
    """
    abs acos age array_append array_cat array_dims array_fill array_length array_lower array_ndims
    array_position array_positions array_prepend array_remove array_replace array_to_json array_to_string
    array_upper ascii asin atan atan2 bit_count bit_length bool box btrim cardinality cast cbrt ceil ceiling
    char_length character_length chr clock_timestamp coalesce concat concat_ws convert_from convert_to cos cot
    current_catalog current_database current_date current_role current_schema current_schemas current_setting
    current_time current_timestamp current_user date date_add date_bin date_part date_subtract date_trunc decode
    degrees div encode exp extract factorial float4 float8 floor format gcd gen_random_uuid generate_series
    generate_subscripts get_bit get_byte greatest hashtext initcap int2 int4 int8 isempty isfinite json_array
    json_array_elements json_array_elements_text json_array_length json_build_array json_build_object json_each
    json_each_text json_extract_path json_extract_path_text json_object json_object_keys json_populate_record
    json_populate_recordset json_strip_nulls json_to_record json_to_recordset json_typeof json_value json_query
    json_exists jsonb_array_elements jsonb_array_elements_text jsonb_array_length jsonb_build_array
    jsonb_build_object jsonb_each jsonb_each_text jsonb_exists jsonb_extract_path jsonb_extract_path_text
    jsonb_insert jsonb_object jsonb_object_keys jsonb_path_exists jsonb_path_match jsonb_path_query
    jsonb_path_query_array jsonb_path_query_first jsonb_populate_record jsonb_populate_recordset jsonb_pretty
    jsonb_set jsonb_set_lax jsonb_strip_nulls jsonb_to_record jsonb_to_recordset jsonb_typeof justify_days
    justify_hours justify_interval lcm least left length ln localtime localtimestamp log log10 lower lower_inc
    lower_inf lpad ltrim make_date make_interval make_time make_timestamp make_timestamptz md5 mod normalize now
    nullif num_nonnulls num_nulls numeric numrange int4range int8range tsrange tstzrange daterange octet_length
    overlay parse_ident pi plainto_tsquery phraseto_tsquery websearch_to_tsquery to_tsquery to_tsvector
    ts_headline ts_rank ts_rank_cd setweight strip position power quote_ident quote_literal quote_nullable
    radians random range_merge regexp_count regexp_instr regexp_like regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table regexp_substr repeat replace reverse right round row row_to_json
    rpad rtrim scale session_user set_bit set_byte sha224 sha256 sha384 sha512 sign sin split_part sqrt
    starts_with statement_timestamp string_to_array string_to_table strpos substr substring tan text timeofday
    timestamp timestamptz timezone to_ascii to_char to_date to_hex to_json to_jsonb to_number to_timestamp
    transaction_timestamp translate trim trim_array trim_scale trunc unnest upper upper_inc upper_inf user
    uuidv4 uuidv7 varchar version width_bucket xmlparse jsonb json interval time inet host masklen
    """.split()  # noqa: SIM905
)
"""Of one row each (or sets of rows), with no effect. What is in no list may be an aggregate, or have effects."""

UNEQUAL: Final = frozenset(
    """
    clock_timestamp gen_random_uuid now random statement_timestamp timeofday transaction_timestamp uuidv4 uuidv7
    nextval currval lastval setval pg_backend_pid txid_current pg_current_xact_id setseed
    """.split()  # noqa: SIM905
)
"""They give every shard another value."""
HARMLESS: Final = UNEQUAL | frozenset(
    """
    acldefault aclexplode array_sample array_shuffle array_sort col_description
    current_query enum_first enum_last enum_range erf erfc format_type has_any_column_privilege has_column_privilege
    has_database_privilege has_function_privilege has_schema_privilege has_sequence_privilege has_table_privilege
    inet_client_addr inet_client_port inet_server_addr inet_server_port json_table jsonb_path_exists_tz makeaclitem
    obj_description pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_blocking_pids pg_char_to_encoding
    pg_client_encoding pg_collation_is_visible pg_column_compression pg_column_size pg_conf_load_time
    pg_current_wal_insert_lsn pg_current_wal_lsn pg_database_size pg_encoding_to_char pg_function_is_visible
    pg_get_constraintdef pg_get_expr pg_get_function_arguments pg_get_function_identity_arguments
    pg_get_function_result pg_get_functiondef pg_get_indexdef pg_get_keywords pg_get_partition_constraintdef
    pg_get_partkeydef pg_get_ruledef pg_get_serial_sequence pg_get_statisticsobjdef pg_get_triggerdef pg_get_userbyid
    pg_get_viewdef pg_has_role pg_indexes_size pg_index_column_has_property pg_is_in_recovery pg_is_other_temp_schema
    pg_listening_channels pg_lock_status pg_my_temp_schema pg_opclass_is_visible pg_operator_is_visible
    pg_options_to_table pg_partition_ancestors pg_partition_root pg_partition_tree pg_postmaster_start_time
    pg_relation_filepath pg_relation_is_publishable pg_relation_size pg_sequence_last_value pg_size_bytes
    pg_size_pretty pg_sleep pg_sleep_for pg_sleep_until pg_snapshot_xmax pg_snapshot_xmin pg_stat_get_activity
    pg_table_is_visible pg_table_size pg_tablespace_location pg_timezone_abbrevs pg_timezone_names
    pg_total_relation_size pg_trigger_depth pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared
    pg_ts_config_is_visible pg_type_is_visible pg_typeof pg_wal_lsn_diff row_security_active shobj_description
    to_regclass to_regnamespace to_regproc to_regrole to_regtype txid_current_if_assigned txid_status
    """.split()  # noqa: SIM905
)
"""Of no list above, and yet nothing of them outlives their transaction in the session."""
UNEQUAL_WORDS: Final = frozenset(
    """
    CURRENT_TIMESTAMP CURRENT_TIME LOCALTIME LOCALTIMESTAMP
    """.split()  # noqa: SIM905
)

# Words before a parenthesis that call nothing.
_SYNTAX: Final = frozenset(
    """
    ALL AND ANY ARRAY AS BETWEEN BY CASE CHECK CONFLICT CUBE CURRENT_TIME CURRENT_TIMESTAMP DISTINCT ELSE EXCEPT
    EXISTS FILTER FROM GROUP GROUPING HAVING IN INNER INTERSECT INTO IS ISNULL JOIN KEY LATERAL LEFT LIKE ILIKE
    LIMIT LOCALTIME LOCALTIMESTAMP MATERIALIZED NOT NOTNULL OFFSET ON ONLY OPERATOR OR ORDER OVER PARTITION
    RETURNING ROLLUP ROW ROWS SELECT SET SETS SIMILAR SOME SYMMETRIC TABLE THEN UNION UPDATE USING VALUES WHEN
    WHERE WINDOW WITH WITHIN CHAR CHARACTER VARCHAR NUMERIC DECIMAL DEC BIT VARYING FLOAT TIME TIMESTAMP
    TIMESTAMPTZ INTERVAL PRECISION BPCHAR SET COLLATE FETCH FIRST NEXT DO NOTHING MATCHED INSERT DELETE SEARCH
    CYCLE ORDINALITY RECURSIVE ESCAPE
    """.split()  # noqa: SIM905
)
MAY_BE_NAMES: Final = frozenset(
    """
    BY CONFLICT CUBE CYCLE DELETE ESCAPE FILTER FIRST INSERT KEY MATCHED MATERIALIZED NEXT NOTHING OPERATOR ORDINALITY
    OVER PARTITION RECURSIVE ROLLUP ROWS SEARCH SET SETS UPDATE VARYING WITHIN
    """.split()  # noqa: SIM905
)
"""Words of the syntax that are not reserved: functions may be called so."""


def is_syntax(word: str) -> bool:
    return word in _SYNTAX
